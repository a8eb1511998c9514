//! Devices, by way of the CUDA driver: memory, pinned host memory, streams, events, launches.
//!
//! A thin layer over the driver's functions: addresses are numbers, every object holds the [`Device`] it belongs to,
//! and every failure is a [`CudaError`]. It keeps no track of who uses which bytes when: copies and launches are
//! `unsafe`, and their callers order them by streams and events.
//!
//! The driver library is looked for at run time. [`probe`] makes sure that it is there, new enough and complete before
//! anything else here calls it, so that nothing here panics on a machine without CUDA.
//!
//! ```text
//! probe → Device::open ┬ allocate → DeviceMemory ── ipc_handle ─► IpcMemory::open, in another process
//!                      ├ register → Registration     (host memory that copies reach without staging)
//!                      ├ stream   → Stream           copy_to_device, copy_to_host, copy_within, fill, launch
//!                      └ event    → Event            Stream::record, Stream::wait, is_done, synchronize
//! ```
//!
//! Each call makes its device's context current on the calling thread, and leaves it so; destructors, which run on whatever
//! thread is the last to hold something, do not.

use std::{ffi::c_int, panic, ptr, sync::OnceLock};

use cudarc::driver::sys;

mod device;
mod error;
mod memory;
mod stream;

pub use device::{Device, MemoryInfo};
pub use error::CudaError;
pub use memory::{DeviceMemory, IpcMemory, Registration};
pub use stream::{Event, Stream};

/// The oldest driver that compiles the embedded PTX: 12.8, which PTX 8.7 came with. Source: `scripts/build_ptx.sh`; PTX
/// ISA, release notes.
const OLDEST_VERSION: i32 = 12080;

/// The driver's functions that this layer calls. All are looked up before any but the first four is called: what looks
/// for them behind `sys` panics where one is missing.
const SYMBOLS: [&str; 40] = [
    "cuDriverGetVersion",
    "cuInit",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer_v2",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamQuery",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncLoad",
    "cuLaunchKernel",
];
/// Of [`SYMBOLS`], those that it takes to say that a driver is too old.
const FIRST_SYMBOLS: usize = 4;

/// The driver of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA version it is of: 1000 · major + 10 · minor.
    pub version: i32,
    /// Devices that this process may use: `CUDA_VISIBLE_DEVICES` is the driver's to read.
    pub devices: u32,
}

/// Whether CUDA can be used, and what there is. Looks once per process; later calls repeat the answer.
///
/// # Errors
/// [`CudaError::Unavailable`], with what is missing: the library, a function of it, a newer version, a device.
pub fn probe() -> Result<Driver, CudaError> {
    static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
    // Nothing in it should panic; whatever does in the library's loading is an answer nevertheless.
    let look =
        || panic::catch_unwind(look).unwrap_or_else(|_| Err(unavailable("it cannot be loaded")));
    DRIVER.get_or_init(look).clone()
}

fn look() -> Result<Driver, CudaError> {
    // SAFETY: loading a library runs its initialisers; those of the driver are made for that.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("no driver library (libcuda.so.1) is installed"));
    }
    // SAFETY: as above; it stays loaded.
    let library = unsafe { sys::culib() };
    // SAFETY: the address is only compared with null, which an error stands for.
    let has = |symbol: &str| unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
    let (first, rest) = SYMBOLS.split_at(FIRST_SYMBOLS);
    require(first, has)?;
    let mut version = 0;
    // SAFETY: the function is there; `version` is the caller's. It may be called before cuInit.
    initialised(unsafe { sys::cuDriverGetVersion(&raw mut version) }, "asking its version")?;
    new_enough(version)?;
    require(rest, has)?;
    // SAFETY: the function is there; 0 is the only value that its flags may have.
    initialised(unsafe { sys::cuInit(0) }, "cuInit")?;
    let mut count: c_int = 0;
    // SAFETY: the function is there, the driver initialised; `count` is the caller's.
    initialised(unsafe { sys::cuDeviceGetCount(&raw mut count) }, "counting devices")?;
    match u32::try_from(count) {
        Ok(devices) if devices > 0 => Ok(Driver { version, devices }),
        _ => Err(unavailable(NO_DEVICE)),
    }
}

const NO_DEVICE: &str = "the driver finds no device that this process may use";

fn unavailable(why: impl Into<String>) -> CudaError {
    CudaError::Unavailable { why: why.into() }
}

/// Fails with the first of `symbols` that is not there.
fn require(symbols: &[&str], has: impl Fn(&str) -> bool) -> Result<(), CudaError> {
    match symbols.iter().find(|symbol| !has(symbol)) {
        None => Ok(()),
        Some(missing) => Err(unavailable(format!("the driver library has no {missing}"))),
    }
}

fn new_enough(version: i32) -> Result<(), CudaError> {
    if version >= OLDEST_VERSION {
        return Ok(());
    }
    let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    let (found, oldest) = (text(version), text(OLDEST_VERSION));
    Err(unavailable(format!("the driver is of CUDA {found}, {oldest} or newer is needed")))
}

/// What a failure before there is a device means.
fn initialised(result: sys::CUresult, call: &str) -> Result<(), CudaError> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(unavailable(NO_DEVICE)),
        failed => {
            let (name, text) = error::described(failed);
            Err(unavailable(format!("the driver is installed, but {call} failed: {name}: {text}")))
        }
    }
}

/// The pointer that an object of the driver is written to.
fn null<T>() -> *mut T {
    ptr::null_mut()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Says aloud what there is; either answer is one line and does not change.
    #[test]
    fn probing_answers_in_one_line_on_every_machine() {
        let answer = probe();
        assert_eq!(answer, probe());
        match answer {
            Ok(driver) => assert!(driver.version >= OLDEST_VERSION && driver.devices > 0),
            Err(error) => {
                let line = error.to_string();
                assert!(
                    line.starts_with("CUDA cannot be used: ") && !line.contains('\n'),
                    "{line}"
                );
                assert_eq!(Device::open(0).err(), Some(error));
            }
        }
    }

    #[test]
    fn a_missing_symbol_is_an_error() {
        assert_eq!(require(&SYMBOLS, |_| true), Ok(()));
        let error = require(&SYMBOLS, |symbol| symbol != "cuFuncLoad").unwrap_err();
        assert_eq!(error.to_string(), "CUDA cannot be used: the driver library has no cuFuncLoad");
    }

    #[test]
    fn a_driver_that_cannot_compile_the_ptx_is_an_error() {
        assert_eq!(new_enough(12080), Ok(()));
        assert_eq!(new_enough(13020), Ok(()));
        let error = new_enough(12040).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CUDA cannot be used: the driver is of CUDA 12.4, 12.8 or newer is needed"
        );
    }

    /// A function that is called and not looked up beforehand could panic.
    #[test]
    fn what_is_called_is_what_is_looked_up() {
        let sources = [
            include_str!("driver.rs"),
            include_str!("driver/device.rs"),
            include_str!("driver/error.rs"),
            include_str!("driver/memory.rs"),
            include_str!("driver/stream.rs"),
        ];
        let called = |source: &'static str| {
            source.split("sys::cu").skip(1).filter_map(|rest| {
                let name = rest.split_once('(')?.0;
                name.chars().all(|c| c.is_alphanumeric() || c == '_').then(|| format!("cu{name}"))
            })
        };
        let called: BTreeSet<String> = sources.into_iter().flat_map(called).collect();
        let looked_up: BTreeSet<String> = SYMBOLS.map(str::to_owned).into();
        assert_eq!(called, looked_up.union(&["culib".to_owned()].into()).cloned().collect());
    }
}
