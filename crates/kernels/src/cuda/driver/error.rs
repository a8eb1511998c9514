//! What can go wrong with a device.

use std::{
    ffi::{CStr, c_char},
    ptr,
};

use cudarc::driver::sys::{self, CUresult};

/// Why something did not happen on a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// This process cannot use CUDA at all, or not this device.
    #[error("CUDA cannot be used: {why}")]
    Unavailable {
        /// What is missing.
        why: String,
    },
    /// There is no such device.
    #[error("device {ordinal} does not exist: {} visible", devices(*.found))]
    NoDevice {
        /// The number that was asked for.
        ordinal: u32,
        /// How many devices this process may use.
        found: u32,
    },
    /// A device has not enough memory.
    #[error("{what}: {} on device {device}, of which {} are free", size(*.needed), size(*.free))]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// The device.
        device: u32,
        /// Bytes asked for.
        needed: u64,
        /// Bytes that were free then.
        free: u64,
    },
    /// A kernel cannot be launched with such parameters.
    #[error("kernel {kernel} cannot be launched: {why}")]
    Launch {
        /// Its entry.
        kernel: &'static str,
        /// What is wrong with them.
        why: String,
    },
    /// A call of the driver failed; possibly for what was asked of the device before, as it works asynchronously.
    #[error("{}{action} failed: {name}: {text}", prefix(*.device))]
    Driver {
        /// The device, if it was one's.
        device: Option<u32>,
        /// What was being done.
        action: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's description of it.
        text: String,
    },
}

impl CudaError {
    /// The same failure, with what it happened to.
    pub(super) fn of(self, what: &str) -> CudaError {
        match self {
            CudaError::Driver { device, action, name, text } => {
                CudaError::Driver { device, action, name, text: format!("{text} ({what})") }
            }
            other => other,
        }
    }
}

/// Whether a call succeeded.
pub(super) fn check(
    result: CUresult,
    device: Option<u32>,
    action: &'static str,
) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, text) = described(result);
    Err(CudaError::Driver { device, action, name, text })
}

/// The driver's name and description of a result.
pub(super) fn described(result: CUresult) -> (String, String) {
    let (mut name, mut text) = (ptr::null(), ptr::null());
    // SAFETY: `name` is ours; an unknown result leaves null there.
    unsafe { sys::cuGetErrorName(result, &raw mut name) };
    // SAFETY: as above, of `text`.
    unsafe { sys::cuGetErrorString(result, &raw mut text) };
    let string = |chars: *const c_char| {
        // SAFETY: not null, it is a constant of the driver library, which is never unloaded.
        (!chars.is_null()).then(|| unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned())
    };
    let number = || format!("error {}", result as u32);
    let no_text = || "the driver has no description of it".to_owned();
    (string(name).unwrap_or_else(number), string(text).unwrap_or_else(no_text))
}

fn prefix(device: Option<u32>) -> String {
    device.map_or_else(String::new, |ordinal| format!("device {ordinal}: "))
}

fn devices(count: u32) -> String {
    if count == 1 { "1 device is".to_owned() } else { format!("{count} devices are") }
}

/// A byte count for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sentences_with_all_numbers() {
        let gib = |n: f64| (n * f64::from(1 << 30)) as u64;
        let (needed, free) = (gib(71.2), gib(62.0));
        let error = CudaError::Memory { what: "parameters", device: 3, needed, free };
        assert_eq!(
            error.to_string(),
            "parameters: 71.2 GiB on device 3, of which 62.0 GiB are free"
        );
        let error = |ordinal, found| CudaError::NoDevice { ordinal, found }.to_string();
        assert_eq!(error(3, 2), "device 3 does not exist: 2 devices are visible");
        assert_eq!(error(1, 1), "device 1 does not exist: 1 device is visible");
        let (name, text) = ("CUDA_ERROR_INVALID_PTX".to_owned(), "a compilation failed".to_owned());
        let action = "loading a kernel";
        let error = CudaError::Driver { device: Some(0), action, name, text }.of("place");
        assert_eq!(
            error.to_string(),
            "device 0: loading a kernel failed: CUDA_ERROR_INVALID_PTX: a compilation failed (place)"
        );
    }

    #[test]
    fn sizes_have_a_digit_after_the_point() {
        let sizes = [1023, 1024, 1536 << 20, u64::MAX].map(size);
        assert_eq!(sizes, ["1023 B", "1.0 KiB", "1.5 GiB", "16777216.0 TiB"]);
    }
}
