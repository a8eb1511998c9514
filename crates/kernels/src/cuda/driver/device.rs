//! A device and its kernels.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CStr, CString, c_char, c_int},
    fmt,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use crate::cuda::table::{self, ENTRIES, Entry};

use super::{
    CudaError, DeviceMemory, Event, Registration, Stream, error::check, null, probe, unavailable,
};

/// The oldest chips that the PTX is for. Source: `scripts/build_ptx.sh`.
const OLDEST_CHIP: (c_int, c_int) = (7, 5);

/// A device by its primary context: the one that everything else in a process uses too, unless it makes its own.
///
/// There is one of it per process and ordinal. It is kept until the process ends: a context that is given back is destroyed
/// under the threads that have it current, as the last of its users goes.
pub struct Device {
    ordinal: u32,
    context: sys::CUcontext,
    name: String,
    uuid: [u8; 16],
    geometry: table::Device,
    kernels: Mutex<Kernels>,
    allocated: AtomicU64,
    peak: AtomicU64,
}

// SAFETY: `context`, modules and functions are handles of the driver, which any thread may use; it locks by itself.
unsafe impl Send for Device {}
// SAFETY: as above; everything else in it is `Sync`.
unsafe impl Sync for Device {}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that nobody has allocated.
    pub free: u64,
    /// All bytes.
    pub total: u64,
}

/// Kernels that are loaded.
#[derive(Default)]
struct Kernels {
    modules: Vec<(&'static str, sys::CUmodule)>,
    functions: HashMap<&'static str, sys::CUfunction>,
}

impl Device {
    /// Opens a device, or hands out the one that is open.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] without CUDA or on a chip that is too old, [`CudaError::NoDevice`], or what the
    /// driver says.
    pub fn open(ordinal: u32) -> Result<Arc<Device>, CudaError> {
        /// A device, once it is open.
        type Place = Arc<Mutex<Option<Arc<Device>>>>;
        static OPEN: Mutex<BTreeMap<u32, Place>> = Mutex::new(BTreeMap::new());
        let found = probe()?.devices;
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let place = Arc::clone(locked(&OPEN).entry(ordinal).or_default());
        // making a context takes a while: that of another device can be made meanwhile
        let mut open = locked(&place);
        if let Some(device) = &*open {
            return Ok(Arc::clone(device));
        }
        Ok(Arc::clone(open.insert(Arc::new(Device::retain(ordinal)?))))
    }

    /// Opens the device that is called `uuid` everywhere ([`Device::uuid`]); `None` where this process may not use it.
    /// Opens no other.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn with_uuid(wanted: [u8; 16]) -> Result<Option<Arc<Device>>, CudaError> {
        for ordinal in 0..probe()?.devices {
            let check = |result, action| check(result, Some(ordinal), action);
            if uuid(handle(ordinal, check)?, check)? == wanted {
                return Device::open(ordinal).map(Some);
            }
        }
        Ok(None)
    }

    fn retain(ordinal: u32) -> Result<Device, CudaError> {
        let check = |result, action| check(result, Some(ordinal), action);
        let handle = handle(ordinal, check)?;
        let attribute = |attribute: Attribute| {
            let mut value = 0;
            // SAFETY: `value` is ours, `handle` a device.
            let got = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, handle) };
            check(got, "asking for an attribute").map(|()| value)
        };
        let name = name(handle, check)?;
        let chip = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if chip < OLDEST_CHIP {
            let ((major, minor), (oldest_major, oldest_minor)) = (chip, OLDEST_CHIP);
            return Err(unavailable(format!(
                "device {ordinal} ({name}) has compute capability {major}.{minor}, \
                 {oldest_major}.{oldest_minor} is needed"
            )));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let geometry = table::Device { multiprocessors: multiprocessors.max(1).cast_unsigned() };
        let uuid = uuid(handle, check)?;
        let mut context = null();
        // SAFETY: `context` is ours, `handle` a device. Never released: see `Device`.
        let got = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) };
        check(got, "making a context")?;
        Ok(Device {
            ordinal,
            context,
            name,
            uuid,
            geometry,
            kernels: Mutex::default(),
            allocated: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        })
    }

    /// Its number among those that this process may use.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is called everywhere, whatever its number in a process.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// What decides grids.
    pub fn geometry(&self) -> table::Device {
        self.geometry
    }

    /// How much memory it has, for all processes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<MemoryInfo, CudaError> {
        let (mut free, mut total) = (0, 0);
        self.call("asking for its memory", || {
            // SAFETY: both are ours.
            unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }
        })?;
        Ok(MemoryInfo { free: free as u64, total: total as u64 })
    }

    /// Allocates memory, for `what` in errors. Nothing is allocated of 0 bytes. The contents are undefined.
    ///
    /// # Errors
    /// [`CudaError::Memory`] when the device has not enough in one piece, or what the driver says.
    pub fn allocate(
        self: &Arc<Self>,
        what: &'static str,
        bytes: u64,
    ) -> Result<DeviceMemory, CudaError> {
        DeviceMemory::allocate(self, what, bytes)
    }

    /// Bytes that are allocated by [`Device::allocate`] and not freed.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// The most that [`Device::allocated_bytes`] ever was since the device was opened.
    pub fn peak_bytes(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    pub(super) fn count_allocated(&self, bytes: u64) {
        let all = self.allocated.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(all, Ordering::Relaxed);
    }

    pub(super) fn count_freed(&self, bytes: u64) {
        self.allocated.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Pins host memory, for this device and all others of the process, so that copies reach it without staging and
    /// kernels can read it. 0 bytes are not pinned.
    ///
    /// # Safety
    /// The memory stays mapped where it is for the life of the [`Registration`].
    ///
    /// # Errors
    /// What the driver says: of memory that is pinned already, say, or too much of it.
    pub unsafe fn register(
        self: &Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Registration, CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { Registration::new(self, start, bytes) }
    }

    /// Makes a stream, which waits for none that it is not told to wait for.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(self: &Arc<Self>) -> Result<Stream, CudaError> {
        Stream::new(self)
    }

    /// Makes an event, at which threads wait asleep.
    ///
    /// # Errors
    /// What the driver says.
    pub fn event(self: &Arc<Self>) -> Result<Event, CudaError> {
        Event::new(self, false)
    }

    /// Makes an event that also knows when it was; for [`Event::seconds_since`].
    ///
    /// # Errors
    /// What the driver says.
    pub fn timed_event(self: &Arc<Self>) -> Result<Event, CudaError> {
        Event::new(self, true)
    }

    /// Compiles and loads all kernels, so that none of it happens in the middle of a load: compiling takes a while, and
    /// the driver may wait for what runs on the device before it loads code.
    ///
    /// # Errors
    /// What the driver says, with the kernel.
    pub fn load_all(&self) -> Result<(), CudaError> {
        ENTRIES.iter().try_for_each(|entry| self.function(entry).map(|_| ()))
    }

    /// A kernel, which is loaded when it is first asked for.
    pub(super) fn function(&self, entry: &Entry) -> Result<sys::CUfunction, CudaError> {
        let mut kernels = locked(&self.kernels);
        if let Some(function) = kernels.functions.get(entry.name) {
            return Ok(*function);
        }
        let module = self.module(&mut kernels, entry)?;
        let refused = |_| CudaError::Launch { kernel: entry.name, why: "a NUL in its name".into() };
        let name = CString::new(entry.name).map_err(refused)?;
        let mut function = null();
        self.call("finding a kernel", || {
            // SAFETY: `function` is ours, `module` loaded, `name` terminated.
            unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) }
        })
        .map_err(|error| error.of(entry.name))?;
        self.call("loading a kernel", || {
            // SAFETY: the function was just found.
            unsafe { sys::cuFuncLoad(function) }
        })
        .map_err(|error| error.of(entry.name))?;
        kernels.functions.insert(entry.name, function);
        Ok(function)
    }

    fn module(&self, kernels: &mut Kernels, entry: &Entry) -> Result<sys::CUmodule, CudaError> {
        // by contents: each mention of a file is a constant of its own
        if let Some((_, module)) = kernels.modules.iter().find(|(ptx, _)| *ptx == entry.ptx) {
            return Ok(*module);
        }
        let refused = |_| CudaError::Launch { kernel: entry.name, why: "a NUL in its PTX".into() };
        let ptx = CString::new(entry.ptx).map_err(refused)?;
        let mut module = null();
        self.call("compiling a kernel", || {
            // SAFETY: `module` is ours, `ptx` terminated, and no longer needed when the call returns.
            unsafe { sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()) }
        })
        .map_err(|error| error.of(entry.name))?;
        kernels.modules.push((entry.ptx, module));
        Ok(module)
    }

    /// Makes the context current, calls, and says what went wrong.
    pub(super) fn call(
        &self,
        action: &'static str,
        call: impl FnOnce() -> CUresult,
    ) -> Result<(), CudaError> {
        self.make_current()?;
        self.check(call(), action)
    }

    pub(super) fn check(&self, result: CUresult, action: &'static str) -> Result<(), CudaError> {
        check(result, Some(self.ordinal), action)
    }

    /// Makes the context current, gives something back, and makes the thread's own context current again: what was handed
    /// out may be dropped on any thread of a server, which has a device of its own in mind.
    ///
    /// Errors are ignored, here and in all destructors of this layer: nobody could be told, and what is left of a context
    /// that has failed goes with the process.
    pub(super) fn release(&self, release: impl FnOnce() -> CUresult) {
        let before = self.current();
        if self.make_current().is_err() {
            return;
        }
        let _ = release();
        if let Ok(before) = before
            && before != self.context
        {
            // SAFETY: it was current just now, so it is whoever made it current who sees to it that it is there; null
            // means none.
            let _ = unsafe { sys::cuCtxSetCurrent(before) };
        }
    }

    /// Makes the context current on this thread, which it usually is. Everything here does so by itself; libraries beside it
    /// (NCCL) want it done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn make_current(&self) -> Result<(), CudaError> {
        if self.current()? == self.context {
            return Ok(());
        }
        // SAFETY: the context is retained for as long as the device is.
        let set = unsafe { sys::cuCtxSetCurrent(self.context) };
        self.check(set, "making its context current")
    }

    /// The context that is current on this thread, or null.
    fn current(&self) -> Result<sys::CUcontext, CudaError> {
        let mut current = null();
        // SAFETY: `current` is ours.
        let got = unsafe { sys::cuCtxGetCurrent(&raw mut current) };
        self.check(got, "asking for the current context").map(|()| current)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Device { ordinal, name, .. } = self;
        f.debug_struct("Device")
            .field("ordinal", ordinal)
            .field("name", name)
            .finish_non_exhaustive()
    }
}

/// The driver's handle of a device. Ordinals are below its count, which is a `c_int`.
fn handle(
    ordinal: u32,
    check: impl Fn(CUresult, &'static str) -> Result<(), CudaError>,
) -> Result<sys::CUdevice, CudaError> {
    let mut handle = 0;
    // SAFETY: `handle` is ours.
    let got = unsafe { sys::cuDeviceGet(&raw mut handle, ordinal as c_int) };
    check(got, "finding the device").map(|()| handle)
}

/// What a device is called.
fn name(
    handle: sys::CUdevice,
    check: impl Fn(CUresult, &'static str) -> Result<(), CudaError>,
) -> Result<String, CudaError> {
    let mut chars: [c_char; 256] = [0; 256];
    // SAFETY: as many characters may be written as there are; `handle` is a device.
    let got = unsafe { sys::cuDeviceGetName(chars.as_mut_ptr(), chars.len() as c_int, handle) };
    check(got, "asking for its name")?;
    let bytes = chars.map(|c| c.to_ne_bytes()[0]);
    let name = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

/// The UUID of a device, or of the part of it that this process may use.
fn uuid(
    handle: sys::CUdevice,
    check: impl Fn(CUresult, &'static str) -> Result<(), CudaError>,
) -> Result<[u8; 16], CudaError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` is ours, `handle` a device.
    let got = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, handle) };
    check(got, "asking for its UUID")?;
    Ok(uuid.bytes.map(|c| c.to_ne_bytes()[0]))
}

/// What is locked stays sound when a thread panics while it holds the lock.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
