//! Memory of a device, of another process's device, and of the host.

use std::{ptr::NonNull, sync::Arc};

use cudarc::driver::sys;

use super::{CudaError, Device};

/// Memory of a device, freed on drop. Freeing waits for what runs on the device.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<Device>,
    address: u64,
    bytes: u64,
}

impl DeviceMemory {
    pub(super) fn allocate(
        device: &Arc<Device>,
        what: &'static str,
        bytes: u64,
    ) -> Result<DeviceMemory, CudaError> {
        let mut address = 0;
        if bytes > 0 {
            device.make_current()?;
            // SAFETY: `address` is ours.
            let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes as usize) };
            if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let free = device.memory()?.free;
                let device = device.ordinal();
                return Err(CudaError::Memory { what, device, needed: bytes, free });
            }
            device.check(result, "allocating memory")?;
        }
        device.count_allocated(bytes);
        Ok(DeviceMemory { device: Arc::clone(device), address, bytes })
    }

    /// Where it starts: a multiple of 256, or 0 where it is empty. Source: CUDA C++ Programming Guide, "Device Memory
    /// Accesses".
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of it.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device that it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What another process on this machine opens it by. The whole piece that the driver took it from is shared: of
    /// less than 2 MiB, that may be more than this memory. Source: CUDA C++ Programming Guide, "Interprocess
    /// Communication".
    ///
    /// # Errors
    /// What the driver says: of empty memory, or where containers are kept apart.
    pub fn ipc_handle(&self) -> Result<[u8; 64], CudaError> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        self.device.call("sharing memory with another process", || {
            // SAFETY: `handle` is ours; the address is that of an allocation, or refused.
            unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.address) }
        })?;
        Ok(handle.reserved.map(|c| c.to_ne_bytes()[0]))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.release(|| {
                // SAFETY: allocated by this object, which goes; the driver waits for the device first.
                unsafe { sys::cuMemFree_v2(self.address) }
            });
        }
        self.device.count_freed(self.bytes);
    }
}

/// Memory of another process's device, unmapped on drop.
///
/// Using it when the other process has freed it is undefined, as is freeing it while this object is there: the
/// processes agree on that.
#[derive(Debug)]
pub struct IpcMemory {
    device: Arc<Device>,
    address: u64,
    bytes: u64,
}

impl IpcMemory {
    /// Opens what another process calls `handle`, and says has `bytes`, for access from `device`; a process cannot open
    /// what it shares itself.
    ///
    /// # Errors
    /// What the driver says: where the handle is not one, or the devices cannot reach each other.
    pub fn open(
        device: &Arc<Device>,
        handle: &[u8; 64],
        bytes: u64,
    ) -> Result<IpcMemory, CudaError> {
        let reserved = handle.map(|byte| i8::from_ne_bytes([byte]) as _);
        let handle = sys::CUipcMemHandle { reserved };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        device.call("opening memory of another process", || {
            // SAFETY: `address` is ours; the driver knows its handles.
            unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) }
        })?;
        Ok(IpcMemory { device: Arc::clone(device), address, bytes })
    }

    /// Where it starts, for the device that it was opened for.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of it, as the other process said.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device that it was opened for.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for IpcMemory {
    fn drop(&mut self) {
        self.device.release(|| {
            // SAFETY: opened by this object, which goes.
            unsafe { sys::cuIpcCloseMemHandle(self.address) }
        });
    }
}

/// Pinned host memory, unpinned on drop.
#[derive(Debug)]
pub struct Registration {
    device: Arc<Device>,
    start: NonNull<u8>,
    bytes: usize,
    device_address: u64,
}

// SAFETY: the pointer is only handed to the driver, which any thread may do.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    /// # Safety
    /// As [`Device::register`].
    pub(super) unsafe fn new(
        device: &Arc<Device>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Registration, CudaError> {
        let mut registration =
            Registration { device: Arc::clone(device), start, bytes: 0, device_address: 0 };
        if bytes == 0 {
            return Ok(registration);
        }
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        device.call("pinning host memory", || {
            // SAFETY: the memory is mapped for as long as it is registered, says the caller.
            unsafe { sys::cuMemHostRegister_v2(start.as_ptr().cast(), bytes, flags) }
        })?;
        // from here on it is unpinned on drop
        registration.bytes = bytes;
        let address = &raw mut registration.device_address;
        device.call("asking where pinned memory is", || {
            // SAFETY: `address` is ours, the memory registered and mapped.
            unsafe { sys::cuMemHostGetDevicePointer_v2(address, start.as_ptr().cast(), 0) }
        })?;
        Ok(registration)
    }

    /// Where kernels of the device find its start; 0 where it is empty.
    pub fn device_address(&self) -> u64 {
        self.device_address
    }

    /// Bytes that are pinned.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is pinned.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.release(|| {
                // SAFETY: registered by this object, which goes, and still mapped, said the caller of `register`.
                unsafe { sys::cuMemHostUnregister(self.start.as_ptr().cast()) }
            });
        }
    }
}
