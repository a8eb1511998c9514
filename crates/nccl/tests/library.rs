//! With a real NCCL and no GPU: what works without one does, and the rest is refused in order.
//!
//! The library is the one `LONGSHORE_NCCL_LIB` names, see `scripts/nccl_check.sh`. It is loaded in child processes:
//! what goes wrong in it is an end of a child, not of the tests.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says so by failing")]

use std::{
    convert::Infallible,
    env,
    io::{self, Write},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use longshore_nccl::{Communicator, MINIMUM, Membership, Nccl};

const LIBRARY: &str = "LONGSHORE_NCCL_LIB";
const CHILD: &str = "LONGSHORE_NCCL_CHILD";
const LIMIT: Duration = Duration::from_secs(60);

/// Does `child` in a process of its own, where there is a library to do it with.
fn in_a_child(test: &str, child: impl FnOnce()) {
    if env::var_os(CHILD).is_some() {
        return child();
    }
    if env::var_os(LIBRARY).is_none_or(|name| name.is_empty()) {
        // past the capture of passing tests' output
        let mut aloud = io::stderr();
        writeln!(aloud, "ignored: no NCCL library, {LIBRARY} names none").unwrap();
        return;
    }
    run(test, Command::new(env::current_exe().unwrap()).env(CHILD, "1"));
}

/// Runs one test in a process of its own, which has to end well and in time.
fn run(test: &str, command: &mut Command) {
    let mut child =
        command.args(["--exact", test, "--nocapture"]).stdin(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test} hangs");
        }
        thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{test}: {status}");
}

#[test]
fn identifiers_are_made_without_a_gpu_and_differ() {
    in_a_child("identifiers_are_made_without_a_gpu_and_differ", || {
        let nccl = Nccl::load().unwrap();
        eprintln!("{} is NCCL {}", nccl.name(), nccl.version());
        assert!(nccl.version() >= MINIMUM);
        let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
        assert!(ids[0] != ids[1]);
        assert!(ids.iter().all(|id| id.0 != [0; 128]));
    });
}

/// On a machine with a GPU the other rank is missing instead, which the limit ends.
#[test]
fn a_communicator_that_cannot_be_is_refused_in_order() {
    in_a_child("a_communicator_that_cannot_be_is_refused_in_order", || {
        let nccl = Nccl::load().unwrap();
        let id = nccl.unique_id().unwrap();
        let membership = Membership { id, rank: 0, world_size: 2, max_ctas: Some(2) };
        let bind = || Ok::<_, Infallible>(());
        let limit = Duration::from_secs(5);
        let (communicator, connected) =
            Communicator::connect(nccl, membership, limit, bind, || ()).unwrap();
        let error = connected.wait().unwrap_err().to_string();
        eprintln!("refused: {error}");
        assert!(error.starts_with("ncclCommInitRankConfig: "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        communicator.abort(Duration::from_secs(10)).unwrap();
    });
}

/// The variable counts, and nothing else is looked for where it is set.
#[test]
fn a_library_that_is_not_there_is_an_ordinary_error() {
    let test = "a_library_that_is_not_there_is_an_ordinary_error";
    if env::var_os(CHILD).is_none() {
        let mut command = Command::new(env::current_exe().unwrap());
        return run(test, command.env(CHILD, "1").env(LIBRARY, "/nowhere/libnccl.so.2"));
    }
    let error = Nccl::load().unwrap_err().to_string();
    assert!(error.starts_with("no NCCL library: /nowhere/libnccl.so.2: "), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert_eq!(Nccl::load().unwrap_err().to_string(), error);
}
