//! A command for a process that finds the emulated driver.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// What the driver is like for a process. The defaults delay and refuse nothing.
#[derive(Debug, Clone)]
pub struct Options {
    /// Devices of the machine; `CUDA_VISIBLE_DEVICES` (ordinals) chooses among them.
    pub devices: u32,
    /// Memory of each device; a 32nd of it is not to be had. Host memory stands for what is allocated.
    pub memory_bytes: u64,
    /// Multiprocessors of each, which decide grids.
    pub multiprocessors: u32,
    /// The CUDA version of the driver, as `cuDriverGetVersion` counts: 13000 is 13.0.
    pub driver_version: u32,
    /// Where random delays and orders begin; 0 for none.
    pub seed: u64,
    /// The longest of these delays, in microseconds.
    pub delay_us_max: u64,
    /// How long after its call an operation begins, in microseconds, unless a thread waits for it, directly or by way
    /// of what other streams wait for: who waits for the wrong thing, or for nothing, comes too early for certain.
    pub late_us: u64,
    /// How long a copy or a kernel takes at least, in microseconds: what overlaps becomes visible in the log.
    pub operation_us_min: u64,
    /// A file to append a line to for each operation and allocation, which [`crate::log`] reads.
    pub log: Option<PathBuf>,
    /// Calls that fail, as `kind:n=error` each: the n-th call of that kind (from 1), all from there on (`n+`), of one
    /// device (`kind@device:n`). Kinds are `alloc`, `free`, `copy`, `memset`, `launch`, `host`, `register`,
    /// `unregister`, `hostalloc`, `hostfree`, `stream`, `event`, `record`, `wait`, `query`, `sync`, `module`,
    /// `context`, `device`, `init`, `ipc`, `memory`, `nccl`, or a function's own name. Errors are named as in
    /// `CUDA_ERROR_ILLEGAL_ADDRESS`; one that loses the context comes when the stream gets to the operation, and stays.
    pub fail: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            devices: 2,
            memory_bytes: 8 << 30,
            multiprocessors: 4,
            driver_version: 13000,
            seed: 0,
            delay_us_max: 2000,
            late_us: 0,
            operation_us_min: 0,
            log: None,
            fail: Vec::new(),
        }
    }
}

/// Sets `command` up so that its process, and those it starts, find the library in `library_dir` and are told the
/// options.
///
/// `CUDA_VISIBLE_DEVICES` is taken out of its environment; set it afterwards where it is wanted.
pub fn emulated(command: &mut Command, library_dir: &Path, options: &Options) {
    let mut search = OsString::from(library_dir);
    if let Some(other) = std::env::var_os("LD_LIBRARY_PATH") {
        search.push(":");
        search.push(other);
    }
    let numbers = [
        ("DEVICES", u64::from(options.devices)),
        ("MEMORY_BYTES", options.memory_bytes),
        ("MULTIPROCESSORS", u64::from(options.multiprocessors)),
        ("DRIVER_VERSION", u64::from(options.driver_version)),
        ("SEED", options.seed),
        ("DELAY_US_MAX", options.delay_us_max),
        ("LATE_US", options.late_us),
        ("OPERATION_US_MIN", options.operation_us_min),
    ];
    command.env("LD_LIBRARY_PATH", search).env_remove("CUDA_VISIBLE_DEVICES");
    command.env_remove("LONGSHORE_NCCL_LIB");
    command.envs(numbers.map(|(name, n)| (format!("EMULATED_CUDA_{name}"), n.to_string())));
    command.env("EMULATED_CUDA_FAIL", options.fail.join(","));
    command.env("EMULATED_CUDA_LOG", options.log.as_deref().unwrap_or(Path::new("")));
}
