//! The driver as a program sees it: symbols of `libcuda.so.1`, in a process of its own for each test.

#![allow(dead_code, reason = "each file of tests uses some of it")]
#![expect(non_snake_case, clippy::too_many_arguments, reason = "functions are the driver's")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
    ptr::{null, null_mut},
};

use longshore_emulator::{Options, emulated, library_dir};

/// A `CUresult`.
pub(crate) type Status = c_int;
/// A `CUdeviceptr`.
pub(crate) type Address = u64;
/// Any of the driver's handles; they are no addresses.
pub(crate) type Handle = *mut c_void;
/// A `CUipcMemHandle`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

pub(crate) const INVALID_VALUE: Status = 1;
pub(crate) const OUT_OF_MEMORY: Status = 2;
pub(crate) const NOT_INITIALIZED: Status = 3;
pub(crate) const NO_DEVICE: Status = 100;
pub(crate) const INVALID_DEVICE: Status = 101;
pub(crate) const INVALID_CONTEXT: Status = 201;
pub(crate) const INVALID_PTX: Status = 218;
pub(crate) const UNSUPPORTED_PTX_VERSION: Status = 222;
pub(crate) const INVALID_HANDLE: Status = 400;
pub(crate) const NOT_FOUND: Status = 500;
pub(crate) const NOT_READY: Status = 600;
pub(crate) const ILLEGAL_ADDRESS: Status = 700;
pub(crate) const CONTEXT_IS_DESTROYED: Status = 709;
pub(crate) const ALREADY_REGISTERED: Status = 712;
pub(crate) const NOT_REGISTERED: Status = 713;
pub(crate) const MISALIGNED_ADDRESS: Status = 716;
pub(crate) const NOT_PERMITTED: Status = 800;
pub(crate) const UNKNOWN: Status = 999;

pub(crate) const NON_BLOCKING: c_uint = 1;

macro_rules! driver {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        /// The functions that tests call.
        #[derive(Debug)]
        pub(crate) struct Driver {
            $($name: unsafe extern "C" fn($($kind),*) -> Status,)*
        }

        impl Driver {
            /// As a program finds it: by the search path of its process.
            fn open() -> Driver {
                // SAFETY: the emulated driver, whose loading runs nothing but the C++ runtime's own.
                let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
                assert!(!library.is_null(), "no libcuda.so.1");
                let symbol = |name: &str| {
                    let name = CString::new(name).unwrap();
                    // SAFETY: the library is open and stays so.
                    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
                    assert!(!symbol.is_null(), "no {name:?}");
                    symbol
                };
                Driver {
                    // SAFETY: the signatures are the driver's.
                    $($name: unsafe {
                        std::mem::transmute::<Handle, unsafe extern "C" fn($($kind),*) -> Status>(
                            symbol(stringify!($name)),
                        )
                    },)*
                }
            }

            $(pub(crate) fn $name(&self, $($argument: $kind),*) -> Status {
                // SAFETY: what a wrong call does is what the tests are about.
                unsafe { (self.$name)($($argument),*) }
            })*
        }
    };
}

driver! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(error: Status, name: *mut *const c_char);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int);
    cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxSetCurrent(context: Handle);
    cuCtxGetCurrent(context: *mut Handle);
    cuCtxGetDevice(device: *mut c_int);
    cuCtxSynchronize();
    cuCtxEnablePeerAccess(peer: Handle, flags: c_uint);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(address: *mut Address, bytes: usize);
    cuMemFree_v2(address: Address);
    cuMemHostRegister_v2(host: *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostUnregister(host: *mut c_void);
    cuMemHostAlloc(host: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemFreeHost(host: *mut c_void);
    cuMemHostGetDevicePointer_v2(address: *mut Address, host: *mut c_void, flags: c_uint);
    cuMemcpyHtoDAsync_v2(to: Address, from: *const c_void, bytes: usize, stream: Handle);
    cuMemcpyHtoD_v2(to: Address, from: *const c_void, bytes: usize);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: Address, bytes: usize, stream: Handle);
    cuMemcpyDtoH_v2(to: *mut c_void, from: Address, bytes: usize);
    cuMemcpyDtoDAsync_v2(to: Address, from: Address, bytes: usize, stream: Handle);
    cuMemsetD8Async(to: Address, value: u8, bytes: usize, stream: Handle);
    cuPointerGetAttribute(data: *mut c_void, attribute: c_int, address: Address);
    cuStreamCreate(stream: *mut Handle, flags: c_uint);
    cuStreamQuery(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint);
    cuLaunchHostFunc(stream: Handle, function: extern "C" fn(*mut c_void), data: *mut c_void);
    cuEventCreate(event: *mut Handle, flags: c_uint);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuEventDestroy_v2(event: Handle);
    cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle);
    cuModuleLoadData(module: *mut Handle, image: *const c_void);
    cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    cuModuleUnload(module: Handle);
    cuLaunchKernel(function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Handle, params: *mut *mut c_void, extra: *mut *mut c_void);
    cuIpcGetMemHandle(handle: *mut IpcHandle, address: Address);
    cuIpcOpenMemHandle_v2(address: *mut Address, handle: IpcHandle, flags: c_uint);
    cuIpcCloseMemHandle(address: Address);
}

/// The call went well.
#[track_caller]
pub(crate) fn ok(status: Status) {
    assert_eq!(status, 0);
}

impl Driver {
    /// A current context on a device.
    #[track_caller]
    pub(crate) fn context(&self, device: c_int) -> Handle {
        ok(self.cuInit(0));
        let mut context = null_mut();
        ok(self.cuDevicePrimaryCtxRetain(&raw mut context, device));
        ok(self.cuCtxSetCurrent(context));
        context
    }

    #[track_caller]
    pub(crate) fn alloc(&self, bytes: usize) -> Address {
        let mut address = 0;
        ok(self.cuMemAlloc_v2(&raw mut address, bytes));
        address
    }

    /// Device memory that holds these bytes.
    #[track_caller]
    pub(crate) fn holding(&self, bytes: &[u8]) -> Address {
        let address = self.alloc(bytes.len());
        ok(self.cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()));
        ok(self.cuCtxSynchronize());
        address
    }

    #[track_caller]
    pub(crate) fn contents(&self, address: Address, bytes: usize) -> Vec<u8> {
        let mut contents = vec![0; bytes];
        ok(self.cuMemcpyDtoH_v2(contents.as_mut_ptr().cast(), address, bytes));
        contents
    }

    /// A stream that the null stream does not order.
    #[track_caller]
    pub(crate) fn stream(&self) -> Handle {
        let mut stream = null_mut();
        ok(self.cuStreamCreate(&raw mut stream, NON_BLOCKING));
        stream
    }

    #[track_caller]
    pub(crate) fn event(&self) -> Handle {
        let mut event = null_mut();
        ok(self.cuEventCreate(&raw mut event, 0));
        event
    }

    /// Pinned host memory, all of it `value`.
    #[track_caller]
    pub(crate) fn pinned(&self, bytes: usize, value: u8) -> &'static mut [u8] {
        let mut host = null_mut();
        ok(self.cuMemHostAlloc(&raw mut host, bytes, 0));
        // SAFETY: the driver has just made it; tests free it when they use it no more.
        let host = unsafe { std::slice::from_raw_parts_mut(host.cast::<u8>(), bytes) };
        host.fill(value);
        host
    }

    /// A kernel of one of the modules of `crates/kernels/ptx`.
    #[track_caller]
    pub(crate) fn kernel(&self, module: &str, name: &CStr) -> Handle {
        let (mut loaded, mut function) = (null_mut(), null_mut());
        ok(self.cuModuleLoadData(&raw mut loaded, ptx(module).as_ptr().cast()));
        ok(self.cuModuleGetFunction(&raw mut function, loaded, name.as_ptr()));
        function
    }

    /// One block of one thread.
    pub(crate) fn launch(
        &self,
        function: Handle,
        stream: Handle,
        params: &[*const c_void],
    ) -> Status {
        let params = params.as_ptr().cast_mut().cast();
        self.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, params, null_mut())
    }

    /// `nvfp4_linear` of two empty lists of scales: writes −∞ · −∞ = ∞ to `alpha`, and 1 / −∞ = −0 to `inverse`.
    pub(crate) fn launch_linear(
        &self,
        function: Handle,
        stream: Handle,
        alpha: Address,
        inverse: Address,
    ) -> Status {
        let (nothing, count) = (0u64, 0u32);
        let nothing: *const c_void = (&raw const nothing).cast();
        let count: *const c_void = (&raw const count).cast();
        let (alpha, inverse) = ((&raw const alpha).cast(), (&raw const inverse).cast());
        self.launch(function, stream, &[nothing, count, nothing, count, alpha, inverse])
    }
}

/// What [`Driver::launch_linear`] writes.
pub(crate) const LINEAR: [u8; 8] = [0, 0, 0x80, 0x7f, 0, 0, 0, 0x80];

/// A module of `crates/kernels/ptx`, as a C string.
pub(crate) fn ptx(module: &str) -> CString {
    let path = format!("{}/../kernels/ptx/{module}.ptx", env!("CARGO_MANIFEST_DIR"));
    CString::new(std::fs::read(path).unwrap()).unwrap()
}

/// Holds a stream back until it is opened.
#[derive(Debug)]
pub(crate) struct Gate {
    opener: std::sync::mpsc::Sender<()>,
}

impl Gate {
    /// What is queued in `stream` from here on does not run.
    #[track_caller]
    pub(crate) fn close(driver: &Driver, stream: Handle) -> Gate {
        extern "C" fn wait(data: *mut c_void) {
            // SAFETY: `close` leaks it for this one call.
            let opened = unsafe { Box::from_raw(data.cast::<std::sync::mpsc::Receiver<()>>()) };
            opened.recv().ok();
        }
        let (opener, opened) = std::sync::mpsc::channel();
        ok(driver.cuLaunchHostFunc(stream, wait, Box::into_raw(Box::new(opened)).cast()));
        Gate { opener }
    }

    pub(crate) fn open(self) {
        self.opener.send(()).unwrap();
    }
}

/// In the process of a test: starts another one for `test` and returns its output. In that one: `Err` with the driver.
pub(crate) fn child(test: &str, options: &Options) -> Option<Result<Output, Driver>> {
    if std::env::var_os("EMULATED_CUDA_CHILD").is_some() {
        return Some(Err(Driver::open()));
    }
    let library = library_dir(env!("CARGO_TARGET_TMPDIR"))?;
    Some(Ok(run(test, library, options, &[])))
}

/// Runs this program's `test` in a process of its own.
pub(crate) fn run(
    test: &str,
    library: &Path,
    options: &Options,
    variables: &[(&str, &str)],
) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    emulated(&mut command, library, options);
    command.env("EMULATED_CUDA_CHILD", "1").envs(variables.iter().copied());
    command.stdin(Stdio::null()).output().unwrap()
}

/// The driver, in a process that is to succeed; `None` in the one that has waited for it.
#[track_caller]
pub(crate) fn driver(test: &str, options: &Options) -> Option<Driver> {
    match child(test, options)? {
        Err(driver) => Some(driver),
        Ok(output) => {
            let text = text(&output);
            // a name that no test has passes too
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
            None
        }
    }
}

/// The driver, in a process that is to die; `None` in the one that has seen it do so, by `signal` and with `words`.
#[track_caller]
pub(crate) fn doomed_driver(
    test: &str,
    options: &Options,
    signal: c_int,
    words: &str,
) -> Option<Driver> {
    use std::os::unix::process::ExitStatusExt as _;
    match child(test, options)? {
        Err(driver) => Some(driver),
        Ok(output) => {
            let text = text(&output);
            assert_eq!(output.status.signal(), Some(signal), "{text}");
            assert!(text.contains(words), "{text}");
            None
        }
    }
}

/// Whether device memory is out of reach for who has no right to it; said aloud where it is not.
pub(crate) fn has_protection_keys() -> bool {
    // SAFETY: a key that is given back.
    let has = unsafe {
        let key = libc::syscall(libc::SYS_pkey_alloc, 0, 0);
        key >= 0 && libc::syscall(libc::SYS_pkey_free, key) == 0
    };
    if !has {
        // past the capture of passing tests' output
        let mut aloud = std::io::stderr();
        writeln!(aloud, "ignored: no protection keys, device memory is in reach").unwrap();
    }
    has
}

/// All that a process has said.
pub(crate) fn text(output: &Output) -> String {
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    format!("{}\n{}{}", output.status, said[0], said[1])
}

/// Null, for handles.
pub(crate) const NULL_STREAM: Handle = null_mut();

/// Null, for what is only read.
pub(crate) fn nowhere() -> *const c_void {
    null()
}
