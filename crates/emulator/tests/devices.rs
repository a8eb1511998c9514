//! Devices, contexts and handles.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use std::{
    ffi::{CStr, c_int, c_void},
    ptr::{null, null_mut},
};

use driver::{
    Address, CONTEXT_IS_DESTROYED, Handle, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE,
    NO_DEVICE, NOT_INITIALIZED, NOT_REGISTERED, child, driver, ok, run, text,
};
use longshore_emulator::{Options, library_dir};

#[test]
fn devices_are_described() {
    let name = "devices_are_described";
    let options = Options {
        devices: 3,
        memory_bytes: 1 << 30,
        multiprocessors: 7,
        driver_version: 12090,
        ..Options::default()
    };
    let Some(driver) = driver(name, &options) else { return };
    let (mut version, mut count, mut bytes) = (0, 0, 0);
    ok(driver.cuDriverGetVersion(&raw mut version));
    assert_eq!(version, 12090);
    assert_eq!(driver.cuDeviceGetCount(&raw mut count), NOT_INITIALIZED);
    ok(driver.cuInit(0));
    ok(driver.cuDeviceGetCount(&raw mut count));
    assert_eq!(count, 3);
    let mut uuids = [[0; 16]; 3];
    for (ordinal, uuid) in (0..3).zip(&mut uuids) {
        let mut device = -1;
        ok(driver.cuDeviceGet(&raw mut device, ordinal));
        ok(driver.cuDeviceGetUuid_v2(uuid, device));
        ok(driver.cuDeviceTotalMem_v2(&raw mut bytes, device));
        assert_eq!(bytes, 1 << 30);
        let attribute = |number| {
            let mut value = -1;
            ok(driver.cuDeviceGetAttribute(&raw mut value, number, device));
            value
        };
        // multiprocessors, compute capability, unified addressing, memory pools
        assert_eq!([16, 75, 76, 41, 115].map(attribute), [7, 9, 0, 1, 0]);
    }
    assert!(uuids[0] != uuids[1] && uuids[1] != uuids[2]);
    let mut text = [1; 64];
    ok(driver.cuDeviceGetName(text.as_mut_ptr(), 64, 2));
    // SAFETY: the driver has terminated it.
    assert_eq!(unsafe { CStr::from_ptr(text.as_ptr()) }, c"Emulated on the host");
    let mut device = 0;
    assert_eq!(driver.cuDeviceGet(&raw mut device, 3), INVALID_DEVICE);
}

#[test]
fn errors_have_the_names_of_the_driver() {
    let name = "errors_have_the_names_of_the_driver";
    let Some(driver) = driver(name, &Options::default()) else { return };
    let mut text = null();
    for (error, name) in [
        (0, c"CUDA_SUCCESS"),
        (2, c"CUDA_ERROR_OUT_OF_MEMORY"),
        (716, c"CUDA_ERROR_MISALIGNED_ADDRESS"),
    ] {
        ok(driver.cuGetErrorName(error, &raw mut text));
        // SAFETY: the driver's names are constants.
        assert_eq!(unsafe { CStr::from_ptr(text) }, name);
    }
    assert_ne!(driver.cuGetErrorName(12345, &raw mut text), 0);
}

/// What a process sees of the machine's devices: by their uuids, in the order of the list.
#[test]
fn visible_devices_are_chosen() {
    let name = "visible_devices_are_chosen";
    let options = Options { devices: 4, ..Options::default() };
    match child(name, &options) {
        None => {}
        Some(Ok(all)) => {
            assert!(all.status.success(), "{}", text(&all));
            let library = library_dir(env!("CARGO_TARGET_TMPDIR")).unwrap();
            for (list, seen) in [("2,0", "[2, 0]"), ("3", "[3]"), ("1,9,2", "[1]"), ("", "none")] {
                let output = run(name, library, &options, &[("CUDA_VISIBLE_DEVICES", list)]);
                let text = text(&output);
                assert!(
                    output.status.success() && text.contains(&format!("sees {seen}")),
                    "{text}"
                );
            }
        }
        Some(Err(driver)) => {
            if driver.cuInit(0) == NO_DEVICE {
                return println!("sees none");
            }
            let mut count: c_int = 0;
            ok(driver.cuDeviceGetCount(&raw mut count));
            let physical = |device| {
                let mut uuid = [0; 16];
                ok(driver.cuDeviceGetUuid_v2(&raw mut uuid, device));
                uuid[15]
            };
            println!("sees {:?}", (0..count).map(physical).collect::<Vec<u8>>());
        }
    }
}

#[test]
fn contexts_end_with_their_last_release() {
    let name = "contexts_end_with_their_last_release";
    let Some(driver) = driver(name, &Options::default()) else { return };
    let first = driver.context(0);
    // retained again
    assert_eq!(driver.context(0), first);
    let (stream, memory) = (driver.stream(), driver.alloc(1000));
    let mut host = vec![0u8; 1000];
    let host: *mut c_void = host.as_mut_ptr().cast();
    ok(driver.cuMemHostRegister_v2(host, 1000, 0));
    ok(driver.cuDevicePrimaryCtxRelease_v2(0));
    ok(driver.cuMemsetD8Async(memory, 1, 1000, stream));
    ok(driver.cuDevicePrimaryCtxRelease_v2(0));
    let mut address: Address = 0;
    assert_eq!(driver.cuMemAlloc_v2(&raw mut address, 8), CONTEXT_IS_DESTROYED);
    assert_eq!(driver.cuCtxSetCurrent(first), CONTEXT_IS_DESTROYED);
    assert_eq!(driver.cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    let second = driver.context(0);
    assert_ne!(second, first);
    assert_eq!(driver.cuStreamSynchronize(stream), INVALID_HANDLE);
    assert_eq!(driver.cuMemFree_v2(memory), driver::INVALID_VALUE);
    assert_eq!(driver.cuMemHostUnregister(host), NOT_REGISTERED);
    driver.alloc(8);
}

#[test]
fn handles_are_of_one_kind_and_of_their_context() {
    let name = "handles_are_of_one_kind_and_of_their_context";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(1);
    let elsewhere = driver.event();
    let context = driver.context(0);
    let (stream, event) = (driver.stream(), driver.event());
    let wrong: [Handle; 4] =
        [event, context, null_mut::<u8>().wrapping_add(0x1234_5678).cast(), null_mut()];
    for handle in &wrong[..3] {
        assert_eq!(driver.cuStreamSynchronize(*handle), INVALID_HANDLE);
    }
    for handle in [stream, wrong[1], wrong[2], wrong[3]] {
        assert_eq!(driver.cuEventRecord(handle, stream), INVALID_HANDLE);
        assert_eq!(driver.cuStreamWaitEvent(stream, handle, 0), INVALID_HANDLE);
    }
    assert_eq!(driver.cuEventRecord(elsewhere, stream), INVALID_HANDLE);
    // another device's event can be waited for
    ok(driver.cuStreamWaitEvent(stream, elsewhere, 0));
    assert_eq!(driver.cuCtxSetCurrent(stream), INVALID_CONTEXT);
    ok(driver.cuEventDestroy_v2(event));
    assert_eq!(driver.cuEventDestroy_v2(event), INVALID_HANDLE);
    assert_eq!(driver.cuEventQuery(event), INVALID_HANDLE);
    ok(driver.cuStreamDestroy_v2(stream));
    assert_eq!(driver.cuStreamDestroy_v2(stream), INVALID_HANDLE);
    ok(driver.cuCtxSetCurrent(null_mut()));
    assert_eq!(driver.cuCtxSynchronize(), INVALID_CONTEXT);
    let mut device = 0;
    assert_eq!(driver.cuCtxGetDevice(&raw mut device), INVALID_CONTEXT);
}

/// A context does not survive fork.
#[test]
fn forks_cannot_use_the_driver() {
    let name = "forks_cannot_use_the_driver";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    // SAFETY: the child calls the driver, which answers before it takes a lock, and ends.
    let fork = unsafe { libc::fork() };
    if fork == 0 {
        let mut count = 0;
        let status = driver.cuDeviceGetCount(&raw mut count);
        // SAFETY: ends the child without the handlers of its parent.
        unsafe { libc::_exit(i32::from(status != NOT_INITIALIZED)) };
    }
    let mut status = -1;
    // SAFETY: `status` is ours.
    assert_eq!(unsafe { libc::waitpid(fork, &raw mut status, 0) }, fork);
    assert_eq!(status, 0);
    driver.alloc(8);
}
