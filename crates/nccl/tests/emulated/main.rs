//! Communicators between processes, by the emulated NCCL on emulated devices.
//!
//! Each rank is a process: this executable again, told its story by the environment.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says so by failing")]

mod place;
mod ranks;
mod stories;

use longshore_emulator::NcclOptions;

use ranks::Ranks;

/// The rank processes' entry: nothing where there is no story.
#[test]
fn rank() {
    stories::tell();
}

/// Sends, receives, broadcasts and all-gathers of uneven sizes, empty ones among them, alone and in groups.
#[test]
fn everything_arrives_where_it_belongs() {
    for size in [1, 2, 4] {
        for seed in [0, 1, 2, 3] {
            let Some(mut ranks) = Ranks::of(size, "everything") else { return };
            ranks.options.seed = seed;
            ranks.start();
            ranks.succeed();
        }
    }
}

/// Ranks that all send first, more than any buffer between them holds.
#[test]
fn all_can_send_before_they_receive() {
    let Some(mut ranks) = Ranks::of(4, "all_send") else { return };
    ranks.start();
    ranks.succeed();
}

/// What the stream of a group's is told afterwards comes afterwards, and groups on two streams in the order of their
/// start.
#[test]
fn groups_are_done_in_the_order_of_their_stream() {
    for seed in [1, 2, 3, 4] {
        let Some(mut ranks) = Ranks::of(2, "order") else { return };
        ranks.options.seed = seed;
        ranks.start();
        ranks.succeed();
    }
}

/// A rank is killed while others wait for it on a stream: all of them abort in time, their streams go on, their memory
/// is theirs again, and they join a new communicator.
#[test]
fn survivors_of_a_killed_rank_abort_and_join_again() {
    for (size, seed) in [(2, 0), (4, 0), (4, 5)] {
        let Some(mut ranks) = Ranks::of(size, "survive") else { return };
        ranks.options.seed = seed;
        ranks.start();
        ranks.wait_for("waits", size);
        ranks.kill(size - 1);
        ranks.note("killed");
        ranks.succeed();
    }
}

/// Where the connection tells, a communicator is known to have failed without being asked anything.
#[test]
fn a_lost_rank_is_noticed_where_the_connection_tells() {
    let Some(mut ranks) = Ranks::of(2, "notice") else { return };
    ranks.nccl = NcclOptions { lost_rank_fails: true, ..NcclOptions::default() };
    ranks.start();
    ranks.wait_for("waits", 2);
    ranks.kill(1);
    ranks.succeed();
}

/// A rank is killed while the others still join: they can abort as well.
#[test]
fn a_rank_that_never_joins_ends_at_the_limit() {
    let Some(mut ranks) = Ranks::of(4, "alone") else { return };
    ranks.start();
    ranks.wait_for("absent", 1);
    ranks.kill(3);
    ranks.succeed();
}

/// An abort that does not return leaves the process free to end.
#[test]
fn an_abort_that_hangs_is_told_in_time() {
    for call in ["ncclCommAbort", "ncclGroupEnd"] {
        let Some(mut ranks) = Ranks::of(2, "stuck") else { return };
        ranks.nccl.fail = vec![format!("{call}:1=hang")];
        ranks.start();
        ranks.succeed();
    }
}

/// Dropping a communicator that hangs takes its five seconds and no more.
#[test]
fn a_drop_that_hangs_is_given_up() {
    let Some(mut ranks) = Ranks::of(2, "drop") else { return };
    ranks.nccl.fail = vec!["ncclCommAbort:1=hang".to_owned()];
    ranks.start();
    ranks.succeed();
}

#[test]
fn failures_of_any_call_are_told_and_the_communicator_aborted() {
    let calls = [
        "ncclGroupStart",
        "ncclSend",
        "ncclRecv",
        "ncclGroupEnd",
        "ncclCommFinalize",
        "ncclCommInitRankConfig",
    ];
    for call in calls {
        let Some(mut ranks) = Ranks::of(2, "fail") else { return };
        ranks.nccl.fail = vec![format!("{call}:1=ncclSystemError")];
        ranks.start();
        ranks.succeed();
    }
}

/// As NCCL has it, and the way around.
#[test]
fn two_ranks_on_a_device_need_hosts_of_their_own() {
    let Some(mut refused) = Ranks::of(2, "duplicate") else { return };
    refused.options.devices = 1;
    refused.start();
    refused.succeed();

    let Some(mut ranks) = Ranks::of(2, "everything") else { return };
    ranks.options.devices = 1;
    ranks.own_hosts = true;
    ranks.start();
    ranks.succeed();
}

/// Sizes that do not fit are the program's mistake, and loud here.
#[test]
fn sizes_that_differ_are_reported() {
    let Some(mut ranks) = Ranks::of(2, "mismatch") else { return };
    ranks.start();
    let said = ranks.fail();
    assert!(said.contains("sends rank") && said.contains("which expects"), "{said}");
}

/// Two communicators in one process, each on a thread and a device of its own.
#[test]
fn ranks_can_be_threads() {
    for seed in [0, 9] {
        let Some(mut ranks) = Ranks::of(1, "threads") else { return };
        ranks.options.seed = seed;
        ranks.start();
        ranks.succeed();
    }
}
