//! Calls that fail on demand.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use driver::{Address, ILLEGAL_ADDRESS, NOT_READY, OUT_OF_MEMORY, UNKNOWN, driver, ok};
use longshore_emulator::Options;

fn failing(failures: &[&str]) -> Options {
    let fail = failures.iter().map(|failure| (*failure).to_owned()).collect();
    Options { fail, ..Options::default() }
}

#[test]
fn one_allocation_fails_and_no_other() {
    let name = "one_allocation_fails_and_no_other";
    let options = failing(&["alloc:2=CUDA_ERROR_OUT_OF_MEMORY"]);
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let mut address: Address = 0;
    ok(driver.cuMemAlloc_v2(&raw mut address, 8));
    assert_eq!(driver.cuMemAlloc_v2(&raw mut address, 8), OUT_OF_MEMORY);
    ok(driver.cuMemAlloc_v2(&raw mut address, 8));
}

#[test]
fn all_later_calls_of_a_device_fail() {
    let name = "all_later_calls_of_a_device_fail";
    let options = failing(&["alloc@1:2+=CUDA_ERROR_OUT_OF_MEMORY"]);
    let Some(driver) = driver(name, &options) else { return };
    let mut address: Address = 0;
    for (device, status) in [(0, 0), (1, OUT_OF_MEMORY)] {
        driver.context(device);
        ok(driver.cuMemAlloc_v2(&raw mut address, 8));
        for _ in 0..3 {
            assert_eq!(driver.cuMemAlloc_v2(&raw mut address, 8), status);
        }
    }
}

/// The call itself succeeds; the copy fails when the stream gets to it, and all that comes after it.
#[test]
fn a_copy_that_loses_the_context_does_so_when_it_runs() {
    let name = "a_copy_that_loses_the_context_does_so_when_it_runs";
    let options = failing(&["copy:2=CUDA_ERROR_ILLEGAL_ADDRESS"]);
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let (stream, event) = (driver.stream(), driver.event());
    let (memory, pinned) = (driver.alloc(8), driver.pinned(8, 1));
    let copy = || driver.cuMemcpyHtoDAsync_v2(memory, pinned.as_ptr().cast(), 8, stream);
    ok(copy());
    ok(driver.cuStreamSynchronize(stream));
    let gate = driver::Gate::close(&driver, stream);
    ok(copy());
    ok(driver.cuEventRecord(event, stream));
    assert_eq!(driver.cuEventQuery(event), NOT_READY);
    gate.open();
    assert_eq!(driver.cuEventSynchronize(event), ILLEGAL_ADDRESS);
    assert_eq!(driver.cuEventQuery(event), ILLEGAL_ADDRESS);
    assert_eq!(copy(), ILLEGAL_ADDRESS);
    assert_eq!(driver.cuMemHostUnregister(pinned.as_mut_ptr().cast()), ILLEGAL_ADDRESS);
    // the other device works on
    driver.context(1);
    driver.alloc(8);
}

#[test]
fn launches_and_functions_by_their_names_fail() {
    let name = "launches_and_functions_by_their_names_fail";
    let options = failing(&[
        "launch:2=CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        "cuStreamSynchronize:2=CUDA_ERROR_UNKNOWN",
    ]);
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let (function, stream) = (driver.kernel("scalars", c"nvfp4_linear"), driver.stream());
    let memory = driver.alloc(8);
    let launch = || driver.launch_linear(function, stream, memory, memory + 4);
    ok(launch());
    assert_eq!(launch(), 701);
    ok(launch());
    ok(driver.cuStreamSynchronize(stream));
    assert_eq!(driver.cuStreamSynchronize(stream), UNKNOWN);
    // that one loses the context
    assert_eq!(launch(), UNKNOWN);
}
