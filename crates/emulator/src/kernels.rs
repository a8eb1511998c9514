//! Single launches on host memory, without a driver around them.

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

type EmulateKernel = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    c_uint,
    c_int,
    *const *const c_void,
    *mut c_int,
) -> c_int;

/// The kernels of the library, as functions of this process.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    emulate_kernel: EmulateKernel,
}

/// The order in which blocks and threads take their turns: a result that depends on it is a race.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// The first thread of the first block first.
    Forwards,
    /// The last thread of the last block first.
    Backwards,
}

/// How a launch went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    /// Each thread came to its end; `synchronised`: some waited for each other.
    ToItsEnd {
        /// Whether there was a barrier.
        synchronised: bool,
    },
    /// Threads ended while others of their block waited for them.
    Diverged,
    /// No kernel has this name.
    Unknown,
}

impl Kernels {
    /// Opens the library of [`crate::library_dir`].
    ///
    /// # Panics
    ///
    /// When it does not load.
    #[expect(clippy::expect_used, reason = "a test says so by failing")]
    pub fn open(library_dir: &Path) -> Kernels {
        let path = library_dir.join("libcuda.so.1");
        let path = CString::new(path.as_os_str().as_bytes()).expect("a path has no NUL");
        // SAFETY: a library that was made from this repository's sources; loading it runs nothing but the C++ runtime's
        // own.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "{path:?} does not load");
        // SAFETY: the handle is open and stays so.
        let symbol = unsafe { libc::dlsym(handle, c"emulate_kernel".as_ptr()) };
        assert!(!symbol.is_null(), "{path:?} has no emulate_kernel");
        // SAFETY: cpp/api_module.cpp defines it with this signature.
        let emulate_kernel = unsafe { std::mem::transmute::<*mut c_void, EmulateKernel>(symbol) };
        Kernels { emulate_kernel }
    }

    /// Runs a kernel on this thread. A misaligned access ends the process.
    ///
    /// # Safety
    ///
    /// `params` are as many as the kernel has, each the address of a value of its type; what is accessed by way of
    /// addresses among them is memory of this process.
    #[expect(clippy::expect_used, reason = "names of kernels are literals")]
    pub unsafe fn run(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        turns: Turns,
        params: &[*const c_void],
    ) -> Ran {
        let name = CString::new(name).expect("a name has no NUL");
        let backwards = c_int::from(turns == Turns::Backwards);
        let mut synchronised = 0;
        // SAFETY: the caller promises it of the parameters; the rest lives until the call returns.
        let outcome = unsafe {
            (self.emulate_kernel)(
                name.as_ptr(),
                blocks,
                threads,
                backwards,
                params.as_ptr(),
                &raw mut synchronised,
            )
        };
        match outcome {
            0 => Ran::ToItsEnd { synchronised: synchronised != 0 },
            -1 => Ran::Unknown,
            _ => Ran::Diverged,
        }
    }
}
