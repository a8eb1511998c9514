//! Device memory of one process, opened by another.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use std::{fmt::Write as _, path::Path};

use driver::{
    Address, Driver, INVALID_CONTEXT, INVALID_VALUE, IpcHandle, LINEAR, doomed_driver, driver, ok,
    run, text,
};
use longshore_emulator::Options;

/// In the environment of a process that opens memory: the handle, in digits.
const HANDLE: &str = "EMULATED_CUDA_TEST_HANDLE";
/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY: u32 = 1;

fn exported(driver: &Driver, memory: Address) -> IpcHandle {
    let mut handle = IpcHandle([0; 64]);
    ok(driver.cuIpcGetMemHandle(&raw mut handle, memory));
    handle
}

fn opened(driver: &Driver, handle: IpcHandle) -> Address {
    let mut address = 0;
    ok(driver.cuIpcOpenMemHandle_v2(&raw mut address, handle, LAZY));
    address
}

/// The handle that another process has given to this one.
fn given() -> Option<IpcHandle> {
    let digits = std::env::var(HANDLE).ok()?;
    let mut bytes = [0; 64];
    for (byte, digits) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    }
    Some(IpcHandle(bytes))
}

/// Runs `test` in a process that is given the handle, and that is to succeed.
fn give(test: &str, handle: IpcHandle) {
    let digits = handle.0.iter().fold(String::new(), |mut digits, byte| {
        write!(digits, "{byte:02x}").unwrap();
        digits
    });
    let library = std::env::var("LD_LIBRARY_PATH").unwrap();
    let library = library.split(':').next().unwrap();
    let output = run(test, Path::new(library), &Options::default(), &[(HANDLE, &digits)]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn another_process_writes_into_shared_memory() {
    let name = "another_process_writes_into_shared_memory";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    if let Some(handle) = given() {
        let memory = opened(&driver, handle);
        // opened twice, closed twice
        assert_eq!(opened(&driver, handle), memory);
        ok(driver.cuIpcCloseMemHandle(memory));
        assert_eq!(driver.contents(memory, 100), [3; 100]);
        let function = driver.kernel("scalars", c"nvfp4_linear");
        let stream = driver.stream();
        ok(driver.launch_linear(function, stream, memory + 8, memory + 12));
        ok(driver.cuMemsetD8Async(memory + 96, 9, 4, stream));
        ok(driver.cuStreamSynchronize(stream));
        assert_eq!(driver.cuMemFree_v2(memory), INVALID_VALUE);
        ok(driver.cuIpcCloseMemHandle(memory));
        assert_eq!(driver.cuIpcCloseMemHandle(memory), INVALID_VALUE);
        return;
    }
    let memory = driver.holding(&[3; 100]);
    give(name, exported(&driver, memory));
    let contents = driver.contents(memory, 100);
    assert_eq!((&contents[..8], &contents[8..16]), (&[3; 8][..], &LINEAR[..]));
    assert_eq!(contents[95..], [3, 9, 9, 9, 9]);
    ok(driver.cuMemFree_v2(memory));
}

#[test]
fn a_process_cannot_open_what_it_shares_or_what_is_not_shared() {
    let name = "a_process_cannot_open_what_it_shares_or_what_is_not_shared";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let memory = driver.alloc(100);
    let mut handle = exported(&driver, memory);
    let mut address: Address = 0;
    assert_eq!(driver.cuIpcOpenMemHandle_v2(&raw mut address, handle, LAZY), INVALID_CONTEXT);
    assert_eq!(
        driver.cuIpcOpenMemHandle_v2(&raw mut address, IpcHandle([7; 64]), LAZY),
        INVALID_VALUE
    );
    assert_eq!(driver.cuIpcGetMemHandle(&raw mut handle, memory + 1), INVALID_VALUE);
}

#[test]
fn memory_that_is_freed_cannot_be_opened() {
    let name = "memory_that_is_freed_cannot_be_opened";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    if let Some(handle) = given() {
        let mut address: Address = 0;
        assert_eq!(driver.cuIpcOpenMemHandle_v2(&raw mut address, handle, LAZY), INVALID_VALUE);
        return;
    }
    let memory = driver.alloc(100);
    let handle = exported(&driver, memory);
    ok(driver.cuMemFree_v2(memory));
    give(name, handle);
}

/// Where it is undefined what the other process finds from then on, this one ends.
#[test]
fn memory_is_not_freed_while_another_process_has_it_open() {
    let name = "memory_is_not_freed_while_another_process_has_it_open";
    let words = "are freed while another process has them open";
    let options = Options::default();
    if let Some(handle) = given() {
        let Some(driver) = doomed_driver(name, &options, 0, words) else { return };
        driver.context(0);
        opened(&driver, handle);
        println!("opened");
        // until the other process ends
        std::io::stdin().read_line(&mut String::new()).unwrap();
        return;
    }
    let Some(driver) = doomed_driver(name, &options, libc::SIGABRT, words) else { return };
    driver.context(0);
    let memory = driver.alloc(100);
    let mut other = opener(name, exported(&driver, memory));
    driver.cuMemFree_v2(memory);
    other.wait().unwrap();
}

/// A process that has opened the memory, and keeps it open while its standard input is.
fn opener(test: &str, handle: IpcHandle) -> std::process::Child {
    use std::{io::BufRead as _, process::Stdio};
    let digits: Vec<String> = handle.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(HANDLE, digits.concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("opened")));
    child
}
