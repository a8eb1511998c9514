//! Modules and launches: which are refused, and what a kernel's fault does to its context.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use std::{
    ffi::{CString, c_void},
    ptr::null_mut,
    sync::atomic::{AtomicU32, Ordering},
};

use driver::{
    Address, Driver, Handle, ILLEGAL_ADDRESS, INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, LINEAR,
    MISALIGNED_ADDRESS, NOT_FOUND, NOT_PERMITTED, UNSUPPORTED_PTX_VERSION, driver, ok, ptx,
};
use longshore_emulator::Options;

fn load(driver: &Driver, image: &str) -> driver::Status {
    let (image, mut module) = (CString::new(image).unwrap(), null_mut());
    driver.cuModuleLoadData(&raw mut module, image.as_ptr().cast())
}

#[test]
fn all_modules_load_with_all_their_kernels() {
    let name = "all_modules_load_with_all_their_kernels";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let mut kernels = 0;
    for module in ["mla", "permute", "place", "scalars", "shuffle", "swizzle"] {
        let text = ptx(module).into_string().unwrap();
        for entry in text.split(".entry ").skip(1) {
            let entry = CString::new(entry.split('(').next().unwrap()).unwrap();
            assert!(!driver.kernel(module, &entry).is_null());
            kernels += 1;
        }
    }
    assert_eq!(kernels, 15);
    let (mut module, mut function) = (null_mut(), null_mut());
    ok(driver.cuModuleLoadData(&raw mut module, ptx("place").as_ptr().cast()));
    assert_eq!(
        driver.cuModuleGetFunction(&raw mut function, module, c"nothing".as_ptr()),
        NOT_FOUND
    );
    ok(driver.cuModuleGetFunction(&raw mut function, module, c"place".as_ptr()));
    ok(driver.cuModuleUnload(module));
    assert_eq!(driver.launch(function, driver.stream(), &[]), INVALID_HANDLE);
    assert_eq!(driver.cuModuleUnload(module), INVALID_HANDLE);
}

#[test]
fn ptx_is_refused_that_a_driver_refuses() {
    let name = "ptx_is_refused_that_a_driver_refuses";
    let options = Options { driver_version: 12080, ..Options::default() };
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let scalars = ptx("scalars").into_string().unwrap();
    ok(load(&driver, &scalars));
    let newer = scalars.replace(".version 8.7", ".version 8.8");
    assert_eq!(load(&driver, &newer), UNSUPPORTED_PTX_VERSION);
    for (part, other) in [
        ("sm_75", "sm_100"),
        (".entry kv_scales(", ".entry kv_scaled("),
        (".param .u64 kv_scales_param_0,", ""),
        (".param .u64 kv_scales_param_0", ".param .u32 kv_scales_param_0"),
    ] {
        assert!(scalars.contains(part), "{part}");
        assert_eq!(load(&driver, &scalars.replace(part, other)), INVALID_PTX, "{part}");
    }
    assert_ne!(load(&driver, "no PTX"), 0);
}

#[test]
fn launches_are_refused_that_cannot_be() {
    let name = "launches_are_refused_that_cannot_be";
    let Some(driver) = driver(name, &Options::default()) else { return };
    let other_context = driver.context(1);
    let other = driver.stream();
    let context = driver.context(0);
    let function = driver.kernel("place", c"place");
    let (stream, values) = (driver.stream(), [0u64; 4]);
    let mut params = values.each_ref().map(|value| std::ptr::from_ref(value).cast_mut().cast());
    let mut launch = |blocks, threads, stream: Handle| {
        let params = params.as_mut_ptr();
        driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, params, null_mut())
    };
    ok(launch(1, 256, stream));
    assert_eq!(launch(0, 256, stream), INVALID_VALUE);
    assert_eq!(launch(1, 0, stream), INVALID_VALUE);
    // more than its launch bounds
    assert_eq!(launch(1, 257, stream), INVALID_VALUE);
    assert_eq!(launch(1, 1, other), INVALID_HANDLE);
    assert_eq!(launch(1, 1, context), INVALID_HANDLE);
    ok(driver.cuCtxSetCurrent(other_context));
    assert_eq!(launch(1, 1, stream), INVALID_HANDLE);
    ok(driver.cuCtxSetCurrent(context));
    ok(driver.cuCtxSynchronize());
}

/// After a launch with these targets: what does the stream say, and does all of the context say it?
fn outcome(driver: &Driver, alpha: Address, inverse: Address) -> driver::Status {
    let function = driver.kernel("scalars", c"nvfp4_linear");
    let (stream, memory) = (driver.stream(), driver.alloc(8));
    ok(driver.launch_linear(function, stream, alpha, inverse));
    let status = driver.cuStreamSynchronize(stream);
    let mut address: Address = 0;
    assert_eq!(driver.cuMemAlloc_v2(&raw mut address, 8), status);
    assert_eq!(driver.cuMemsetD8Async(memory, 0, 8, stream), status);
    assert_eq!(driver.launch_linear(function, stream, memory, memory + 4), status);
    assert_eq!(driver.cuCtxSynchronize(), status);
    assert_eq!(driver.cuStreamDestroy_v2(stream), status);
    status
}

#[test]
fn a_misaligned_access_loses_the_context() {
    let name = "a_misaligned_access_loses_the_context";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let memory = driver.alloc(12);
    assert_eq!(outcome(&driver, memory + 2, memory + 8), MISALIGNED_ADDRESS);
    // not that of another device
    driver.context(1);
    let memory = driver.alloc(8);
    ok(outcome(&driver, memory, memory + 4));
}

#[test]
fn an_access_outside_of_memory_loses_the_context() {
    let name = "an_access_outside_of_memory_loses_the_context";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let memory = driver.alloc(4096);
    assert_eq!(outcome(&driver, memory, memory + 4096), ILLEGAL_ADDRESS);
    driver.context(1);
    assert_eq!(outcome(&driver, 0, 0), ILLEGAL_ADDRESS);
}

/// Its address works here, as kernels run on the host; on a device it would not.
#[test]
fn kernels_are_given_no_host_memory_but_pinned() {
    let name = "kernels_are_given_no_host_memory_but_pinned";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let pinned = driver.pinned(8, 0);
    let at = pinned.as_ptr() as Address;
    ok(outcome(&driver, at, at + 4));
    assert_eq!(pinned, LINEAR);
    let pageable = vec![0u8; 8];
    let at = pageable.as_ptr() as Address;
    assert_eq!(outcome(&driver, at, at + 4), ILLEGAL_ADDRESS);
    assert_eq!(pageable, [0; 8]);
}

#[test]
fn kernels_see_other_devices_with_peer_access_only() {
    let name = "kernels_see_other_devices_with_peer_access_only";
    let Some(driver) = driver(name, &Options::default()) else { return };
    let other = driver.context(1);
    let memory = driver.alloc(8);
    let mut can = 0;
    driver.context(0);
    ok(driver.cuDeviceCanAccessPeer(&raw mut can, 0, 1));
    assert_eq!(can, 1);
    ok(driver.cuCtxEnablePeerAccess(other, 0));
    assert_ne!(driver.cuCtxEnablePeerAccess(other, 0), 0);
    ok(outcome(&driver, memory, memory + 4));
    assert_eq!(driver.contents(memory, 8), LINEAR);
    let there = driver.alloc(8);
    driver.context(1);
    let status = if driver::has_protection_keys() { ILLEGAL_ADDRESS } else { 0 };
    assert_eq!(outcome(&driver, there, there + 4), status);
}

static CALLS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: *mut c_void) {
    CALLS.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn host_functions_are_not_called_in_a_lost_context() {
    let name = "host_functions_are_not_called_in_a_lost_context";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (function, stream) = (driver.kernel("scalars", c"nvfp4_linear"), driver.stream());
    ok(driver.cuLaunchHostFunc(stream, count, null_mut()));
    ok(driver.cuStreamSynchronize(stream));
    let gate = driver::Gate::close(&driver, stream);
    ok(driver.launch_linear(function, stream, 0, 0));
    ok(driver.cuLaunchHostFunc(stream, count, null_mut()));
    gate.open();
    assert_eq!(driver.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    assert_eq!(CALLS.load(Ordering::SeqCst), 1);
}

#[test]
fn host_functions_call_nothing_of_the_driver() {
    static STATUS: AtomicU32 = AtomicU32::new(0);
    extern "C" fn call(driver: *mut c_void) {
        // SAFETY: the test waits for this call.
        let driver = unsafe { &*driver.cast::<Driver>() };
        STATUS.store(driver.cuCtxSynchronize().cast_unsigned(), Ordering::SeqCst);
    }
    let name = "host_functions_call_nothing_of_the_driver";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let stream = driver.stream();
    ok(driver.cuLaunchHostFunc(stream, call, (&raw const driver).cast_mut().cast()));
    ok(driver.cuStreamSynchronize(stream));
    assert_eq!(STATUS.load(Ordering::SeqCst).cast_signed(), NOT_PERMITTED);
}

/// Kernels with barriers, of two streams of each of two devices, at the same time.
#[test]
fn kernels_with_barriers_run_side_by_side() {
    let name = "kernels_with_barriers_run_side_by_side";
    let Some(driver) = driver(name, &Options { seed: 3, ..Options::default() }) else { return };
    let (bands, row_bytes) = (8u64, 1024u32);
    let source: Vec<u8> =
        (0..bands * 16 * u64::from(row_bytes)).map(|i| (i * 7 % 251) as u8).collect();
    let mut work = Vec::new();
    for device in [0, 1] {
        let context = driver.context(device);
        let function = driver.kernel("shuffle", c"shuffle_weights");
        for _ in 0..2 {
            let (stream, memory) = (driver.stream(), driver.holding(&source));
            let workspace = 0u64;
            let params: [*const c_void; 4] = [
                (&raw const memory).cast(),
                (&raw const bands).cast(),
                (&raw const row_bytes).cast(),
                (&raw const workspace).cast(),
            ];
            let params = params.as_ptr().cast_mut().cast();
            ok(driver.cuLaunchKernel(function, 3, 1, 1, 512, 1, 1, 0, stream, params, null_mut()));
            work.push((context, stream, memory));
        }
    }
    let unit = |at: usize| &source[at * 16..][..16];
    for (context, stream, memory) in work {
        ok(driver.cuCtxSetCurrent(context));
        ok(driver.cuStreamSynchronize(stream));
        let contents = driver.contents(memory, source.len());
        // unit u of row n of a band of 16 rows goes to 16u + n
        for (at, got) in contents.chunks_exact(16).enumerate() {
            let (band, at) = (at / 1024, at % 1024);
            assert_eq!(got, unit(band * 1024 + at % 16 * 64 + at / 16), "unit {at} of band {band}");
        }
    }
}
