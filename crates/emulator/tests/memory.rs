//! Device memory and pinned host memory: whose they are, and until when.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use std::{ffi::c_void, ptr::null_mut};

use driver::{
    ALREADY_REGISTERED, Address, Driver, Gate, ILLEGAL_ADDRESS, INVALID_CONTEXT, INVALID_VALUE,
    LINEAR, NOT_REGISTERED, OUT_OF_MEMORY, doomed_driver, driver, ok,
};
use longshore_emulator::Options;

#[test]
fn memory_starts_as_garbage_and_runs_out() {
    let name = "memory_starts_as_garbage_and_runs_out";
    let options = Options { memory_bytes: 64 << 20, ..Options::default() };
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let free = || {
        let (mut free, mut total) = (0, 0);
        ok(driver.cuMemGetInfo_v2(&raw mut free, &raw mut total));
        assert_eq!(total, 64 << 20);
        free
    };
    let empty = free();
    // a context is not for free
    assert!(empty < 64 << 20);
    let memory = driver.alloc(40 << 20);
    assert_eq!(free(), empty - (40 << 20));
    assert_eq!(memory % 256, 0);
    let contents = driver.contents(memory, 40 << 20);
    assert!(contents.iter().all(|byte| *byte == 0xc5));
    let mut other: Address = 0;
    assert_eq!(driver.cuMemAlloc_v2(&raw mut other, 40 << 20), OUT_OF_MEMORY);
    assert_eq!(driver.cuMemAlloc_v2(&raw mut other, 0), INVALID_VALUE);
    ok(driver.cuMemFree_v2(memory));
    let again = driver.alloc(40 << 20);
    assert_ne!(again, memory, "an address is never used again");
    assert_eq!(driver.cuMemFree_v2(memory), INVALID_VALUE);
    assert_eq!(driver.cuMemFree_v2(again + 256), INVALID_VALUE);
    ok(driver.cuMemFree_v2(again));
    assert_eq!(free(), empty);
}

#[test]
fn copies_stay_within_one_allocation() {
    let name = "copies_stay_within_one_allocation";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (stream, memory, mut host) = (driver.stream(), driver.alloc(1000), vec![0u8; 2000]);
    let host: *mut c_void = host.as_mut_ptr().cast();
    for (start, bytes) in
        [(memory, 1001), (memory + 999, 2), (memory - 1, 2), (memory + 1000, 1), (8, 1)]
    {
        assert_eq!(driver.cuMemcpyHtoDAsync_v2(start, host, bytes, stream), INVALID_VALUE);
        assert_eq!(driver.cuMemcpyDtoHAsync_v2(host, start, bytes, stream), INVALID_VALUE);
        assert_eq!(driver.cuMemsetD8Async(start, 0, bytes, stream), INVALID_VALUE);
    }
    // device memory is no host memory, nor the other way round
    assert_eq!(
        driver.cuMemcpyHtoDAsync_v2(memory, memory as *const c_void, 10, stream),
        INVALID_VALUE
    );
    assert_eq!(driver.cuMemcpyDtoDAsync_v2(memory, host as Address, 10, stream), INVALID_VALUE);
    // overlapping
    assert_eq!(driver.cuMemcpyDtoDAsync_v2(memory, memory + 5, 10, stream), INVALID_VALUE);
    // nothing, anywhere
    ok(driver.cuMemcpyHtoDAsync_v2(8, host, 0, stream));
    ok(driver.cuMemcpyDtoDAsync_v2(memory, memory + 500, 500, stream));
    ok(driver.cuStreamSynchronize(stream));
}

#[test]
fn host_memory_is_registered_once_and_as_a_whole() {
    let name = "host_memory_is_registered_once_and_as_a_whole";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (stream, memory) = (driver.stream(), driver.alloc(4096));
    let mut host = vec![7u8; 8192];
    let start: *mut u8 = host.as_mut_ptr();
    let at = |offset| start.wrapping_add(offset).cast::<c_void>();
    ok(driver.cuMemHostRegister_v2(at(0), 4096, 0));
    assert_eq!(driver.cuMemHostRegister_v2(at(0), 4096, 0), ALREADY_REGISTERED);
    assert_eq!(driver.cuMemHostRegister_v2(at(4000), 4096, 0), ALREADY_REGISTERED);
    ok(driver.cuMemHostRegister_v2(at(4096), 4096, 0));
    // into the second registration
    assert_eq!(driver.cuMemcpyHtoDAsync_v2(memory, at(4000), 200, stream), INVALID_VALUE);
    let mut address: Address = 0;
    ok(driver.cuMemHostGetDevicePointer_v2(&raw mut address, at(100), 0));
    assert_eq!(address, at(100) as Address);
    assert_eq!(driver.cuMemHostUnregister(at(1)), NOT_REGISTERED);
    ok(driver.cuMemHostUnregister(at(0)));
    ok(driver.cuMemHostUnregister(at(4096)));
    assert_eq!(driver.cuMemHostUnregister(at(0)), NOT_REGISTERED);
    assert_eq!(driver.cuMemHostGetDevicePointer_v2(&raw mut address, at(100), 0), INVALID_VALUE);
    // nothing is mapped there
    assert_eq!(driver.cuMemHostRegister_v2(8192 as *mut c_void, 4096, 0), INVALID_VALUE);
    let mut pinned = null_mut();
    ok(driver.cuMemHostAlloc(&raw mut pinned, 100, 0));
    assert_eq!(driver.cuMemHostUnregister(pinned), NOT_REGISTERED);
    ok(driver.cuMemFreeHost(pinned));
    assert_eq!(driver.cuMemFreeHost(pinned), INVALID_VALUE);
}

#[test]
fn memory_is_what_the_driver_says_it_is() {
    let name = "memory_is_what_the_driver_says_it_is";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(1);
    let memory = driver.alloc(1000);
    let pinned = driver.pinned(1000, 0);
    let attribute = |number, address| {
        let mut value = 0u32;
        let status = driver.cuPointerGetAttribute((&raw mut value).cast(), number, address);
        (status, value)
    };
    let (memory_type, ordinal) = (2, 9);
    assert_eq!(attribute(memory_type, memory + 999), (0, 2));
    assert_eq!(attribute(ordinal, memory), (0, 1));
    assert_eq!(attribute(memory_type, pinned.as_ptr() as Address), (0, 1));
    assert_eq!(attribute(memory_type, memory + 1000).0, INVALID_VALUE);
    assert_eq!(attribute(memory_type, (&raw const memory) as Address).0, INVALID_VALUE);
}

/// Freeing waits for what is queued, so that it is the last to use the memory.
#[test]
fn freeing_waits_for_the_device() {
    let name = "freeing_waits_for_the_device";
    let options = Options { late_us: 100_000, ..Options::default() };
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let (stream, memory, pinned) =
        (driver.stream(), driver.holding(&[5; 100]), driver.pinned(100, 0));
    ok(driver.cuMemcpyDtoHAsync_v2(pinned.as_mut_ptr().cast(), memory, 100, stream));
    ok(driver.cuMemFree_v2(memory));
    assert_eq!(pinned, [5; 100]);
}

/// A kernel that comes too late finds nothing: the context is lost.
#[test]
fn freed_memory_is_out_of_reach() {
    let name = "freed_memory_is_out_of_reach";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let function = driver.kernel("scalars", c"nvfp4_linear");
    let (stream, kept, memory) = (driver.stream(), driver.alloc(8), driver.alloc(8));
    ok(driver.launch_linear(function, stream, memory, memory + 4));
    ok(driver.cuStreamSynchronize(stream));
    assert_eq!(driver.contents(memory, 8), LINEAR);
    ok(driver.cuMemFree_v2(memory));
    ok(driver.launch_linear(function, stream, memory, memory + 4));
    assert_eq!(driver.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    assert_eq!(driver.launch_linear(function, stream, kept, kept + 4), ILLEGAL_ADDRESS);
    assert_eq!(driver.cuMemFree_v2(kept), ILLEGAL_ADDRESS);
}

#[test]
fn calls_need_a_context_of_the_calling_thread() {
    let name = "calls_need_a_context_of_the_calling_thread";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    driver.alloc(8);
    std::thread::scope(|scope| {
        let other = || {
            let mut address: Address = 0;
            driver.cuMemAlloc_v2(&raw mut address, 8)
        };
        assert_eq!(scope.spawn(other).join().unwrap(), INVALID_CONTEXT);
    });
}

// ---- what ends the process ------------------------------------------------------------------------------------------

#[test]
fn threads_of_the_program_cannot_touch_device_memory() {
    let name = "threads_of_the_program_cannot_touch_device_memory";
    if !driver::has_protection_keys() {
        return;
    }
    let words = "is accessed by a thread of the program";
    let options = Options::default();
    let Some(driver) = doomed_driver(name, &options, libc::SIGSEGV, words) else { return };
    driver.context(0);
    let memory = driver.holding(&[1; 8]);
    // SAFETY: it is not, which ends the process.
    let byte = unsafe { (memory as *const u8).read_volatile() };
    assert_eq!(byte, 0, "readable");
}

#[test]
fn writes_around_an_allocation_are_noticed() {
    let name = "writes_around_an_allocation_are_noticed";
    let words = "byte 8 of the 8 at";
    let options = Options::default();
    let Some(driver) = doomed_driver(name, &options, libc::SIGABRT, words) else { return };
    driver.context(0);
    let function = driver.kernel("scalars", c"nvfp4_linear");
    let (stream, memory) = (driver.stream(), driver.alloc(8));
    ok(driver.launch_linear(function, stream, memory + 4, memory + 8));
    ok(driver.cuStreamSynchronize(stream));
    driver.cuMemFree_v2(memory);
}

/// A copy of 100 bytes to the device that does not begin.
fn held_copy(driver: &Driver, host: *const u8) -> Gate {
    let (stream, memory) = (driver.stream(), driver.alloc(100));
    let gate = Gate::close(driver, stream);
    ok(driver.cuMemcpyHtoDAsync_v2(memory, host.cast(), 100, stream));
    gate
}

#[test]
fn host_memory_stays_registered_while_it_is_used() {
    let name = "host_memory_stays_registered_while_it_is_used";
    let words = "are unregistered while 1 operations use them";
    let options = Options::default();
    let Some(driver) = doomed_driver(name, &options, libc::SIGABRT, words) else { return };
    driver.context(0);
    let mut host = vec![1u8; 1000];
    ok(driver.cuMemHostRegister_v2(host.as_mut_ptr().cast(), 1000, 0));
    let _held = held_copy(&driver, &raw const host[500]);
    driver.cuMemHostUnregister(host.as_mut_ptr().cast());
}

#[test]
fn pinned_memory_is_not_freed_while_it_is_used() {
    let name = "pinned_memory_is_not_freed_while_it_is_used";
    let words = "are freed while 1 operations use them";
    let options = Options::default();
    let Some(driver) = doomed_driver(name, &options, libc::SIGABRT, words) else { return };
    driver.context(0);
    let host = driver.pinned(1000, 1);
    let _held = held_copy(&driver, host.as_ptr());
    driver.cuMemFreeHost(host.as_mut_ptr().cast());
}

#[test]
fn registered_memory_stays_mapped_while_it_is_used() {
    let name = "registered_memory_stays_mapped_while_it_is_used";
    let words = "of a queued htod of 100 bytes is gone";
    let options = Options::default();
    let Some(driver) = doomed_driver(name, &options, libc::SIGABRT, words) else { return };
    driver.context(0);
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new pages, unmapped below.
    let host = unsafe { libc::mmap(null_mut(), 4096, rights, kind, -1, 0) };
    ok(driver.cuMemHostRegister_v2(host, 4096, 0));
    let held = held_copy(&driver, host.cast());
    // SAFETY: nothing of Rust's is there.
    unsafe { libc::munmap(host, 4096) };
    held.open();
    driver.cuCtxSynchronize();
}
