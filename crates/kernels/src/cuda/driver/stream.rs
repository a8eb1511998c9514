//! Streams, on which a device works in order, and events, which order streams and tell the host.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::sys::{self, CUevent_flags_enum as EventFlags, CUresult};

use crate::cuda::table::{Entry, Grid, Kernel};

use super::{CudaError, Device, null};

/// A queue of work for a device, done in order.
///
/// What is asked of it returns at once, unless the driver's queue is full or memory of the host is not pinned. Errors
/// of the work itself come with some later call. Dropping it waits for nothing: its work is still done.
#[derive(Debug)]
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
}

// SAFETY: a handle of the driver, which any thread may use; it locks by itself.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Stream, CudaError> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = null();
        device.call("making a stream", || {
            // SAFETY: `raw` is ours. Destroyed by `drop`.
            unsafe { sys::cuStreamCreate(&raw mut raw, flags) }
        })?;
        Ok(Stream { device: Arc::clone(device), raw })
    }

    /// The device that works.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Copies `bytes` from the host to the device.
    ///
    /// # Safety
    /// The source can be read and the target is memory of the device until the copy is done; meanwhile nobody writes to
    /// the source, and nobody else reads or writes the target.
    ///
    /// # Errors
    /// What the driver says.
    pub unsafe fn copy_to_device(
        &self,
        target: u64,
        source: *const u8,
        bytes: u64,
    ) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.call("copying to the device", || {
            // SAFETY: the caller says so.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, source.cast(), bytes as usize, self.raw) }
        })
    }

    /// Copies `bytes` from the device to the host.
    ///
    /// # Safety
    /// The target can be written and the source is memory of the device until the copy is done; meanwhile nobody writes
    /// to the source, and nobody else reads or writes the target.
    ///
    /// # Errors
    /// What the driver says.
    pub unsafe fn copy_to_host(
        &self,
        target: *mut u8,
        source: u64,
        bytes: u64,
    ) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.call("copying to the host", || {
            // SAFETY: the caller says so.
            unsafe { sys::cuMemcpyDtoHAsync_v2(target.cast(), source, bytes as usize, self.raw) }
        })
    }

    /// Copies `bytes` from one place on the device to another; or to what it can reach: [`super::IpcMemory`], say.
    ///
    /// # Safety
    /// Both are memory of the device, or opened for it, until the copy is done, and do not overlap; meanwhile nobody
    /// writes to the source, and nobody else reads or writes the target.
    ///
    /// # Errors
    /// What the driver says.
    pub unsafe fn copy_within(
        &self,
        target: u64,
        source: u64,
        bytes: u64,
    ) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.call("copying within the device", || {
            // SAFETY: the caller says so.
            unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, bytes as usize, self.raw) }
        })
    }

    /// Makes every one of `bytes` bytes `value`.
    ///
    /// # Safety
    /// The target is memory of the device until it is done; meanwhile nobody else reads or writes it.
    ///
    /// # Errors
    /// What the driver says.
    pub unsafe fn fill(&self, target: u64, value: u8, bytes: u64) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.device.call("filling memory", || {
            // SAFETY: the caller says so.
            unsafe { sys::cuMemsetD8Async(target, value, bytes as usize, self.raw) }
        })
    }

    /// Launches a kernel, which is loaded if it is not ([`Device::load_all`]).
    ///
    /// # Safety
    /// Parameters are what the kernel's documentation says. Memory that they name is that of the device until it is
    /// done; meanwhile nobody writes to what it reads, and nobody else reads or writes what it writes.
    ///
    /// # Errors
    /// [`CudaError::Launch`] of a grid that the kernel is not made for, or what the driver says.
    pub unsafe fn launch<K: Kernel>(&self, kernel: &K, grid: Grid) -> Result<(), CudaError> {
        let (entry, arguments) = (K::ENTRY, kernel.arguments());
        fits(&entry, arguments.len(), grid)?;
        let function = self.device.function(&entry)?;
        self.device
            .call("launching a kernel", || {
                // SAFETY: the arguments are as many as the entry has parameters, as large as its table says, and copied
                // by the call, which does not write to them; what they mean is the caller's promise.
                unsafe {
                    sys::cuLaunchKernel(
                        function,
                        grid.blocks,
                        1,
                        1,
                        grid.threads,
                        1,
                        1,
                        0,
                        self.raw,
                        arguments.as_ptr().cast_mut().cast(),
                        null(),
                    )
                }
            })
            .map_err(|error| error.of(entry.name))
    }

    /// Has what is asked of the stream from now on wait for what was asked before `event` was last recorded, on
    /// whatever device; for nothing if it never was.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        self.device.call("waiting for an event", || {
            // SAFETY: both are there; the driver keeps what it needs of the event.
            unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }
        })
    }

    /// Records `event`, of the same device: it is done when all that was asked of the stream so far is.
    ///
    /// # Errors
    /// What the driver says.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.device.call("recording an event", || {
            // SAFETY: both are there; the driver keeps what it needs of the event.
            unsafe { sys::cuEventRecord(event.raw, self.raw) }
        })
    }

    /// Waits until all that was asked of it is done, awake as a rule: [`Event::synchronize`] sleeps.
    ///
    /// # Errors
    /// What the driver says, of the work too.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.call("waiting for a stream", || {
            // SAFETY: the stream is there.
            unsafe { sys::cuStreamSynchronize(self.raw) }
        })
    }

    /// Whether all that was asked of it is done.
    ///
    /// # Errors
    /// What the driver says, of the work too.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        is_done(&self.device, "asking for the state of a stream", || {
            // SAFETY: the stream is there.
            unsafe { sys::cuStreamQuery(self.raw) }
        })
    }

    /// The driver's handle, for libraries that launch on streams of others; valid as long as the stream.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.device.release(|| {
            // SAFETY: made by this object, which goes.
            unsafe { sys::cuStreamDestroy_v2(self.raw) }
        });
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: a handle of the driver, which any thread may use; it locks by itself.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(device: &Arc<Device>, timed: bool) -> Result<Event, CudaError> {
        let untimed = if timed { 0 } else { EventFlags::CU_EVENT_DISABLE_TIMING as u32 };
        let flags = EventFlags::CU_EVENT_BLOCKING_SYNC as u32 | untimed;
        let mut raw = null();
        device.call("making an event", || {
            // SAFETY: `raw` is ours. Destroyed by `drop`.
            unsafe { sys::cuEventCreate(&raw mut raw, flags) }
        })?;
        Ok(Event { device: Arc::clone(device), raw })
    }

    /// Whether what it was last recorded behind is done; true if it never was recorded.
    ///
    /// # Errors
    /// What the driver says, of the work too.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        is_done(&self.device, "asking for the state of an event", || {
            // SAFETY: the event is there.
            unsafe { sys::cuEventQuery(self.raw) }
        })
    }

    /// Waits until it is done; the thread sleeps.
    ///
    /// # Errors
    /// What the driver says, of the work too.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.device.call("waiting for an event", || {
            // SAFETY: the event is there.
            unsafe { sys::cuEventSynchronize(self.raw) }
        })
    }

    /// Seconds from `earlier` to this event on the device's clock; both are timed and done.
    ///
    /// # Errors
    /// What the driver says: when one of them is not timed, was not recorded or is not done.
    pub fn seconds_since(&self, earlier: &Event) -> Result<f64, CudaError> {
        let mut milliseconds = 0.0;
        self.device.call("asking for the time between events", || {
            // SAFETY: `milliseconds` is ours, both events are there.
            unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.raw, self.raw) }
        })?;
        Ok(f64::from(milliseconds) / 1000.0)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.device.release(|| {
            // SAFETY: made by this object, which goes; the driver keeps what waits for it.
            unsafe { sys::cuEventDestroy_v2(self.raw) }
        });
    }
}

fn is_done(
    device: &Device,
    action: &'static str,
    query: impl FnOnce() -> CUresult,
) -> Result<bool, CudaError> {
    device.make_current()?;
    match query() {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        result => device.check(result, action).map(|()| true),
    }
}

/// Whether a kernel can be launched with `arguments` arguments on `grid`.
fn fits(entry: &Entry, arguments: usize, grid: Grid) -> Result<(), CudaError> {
    let Grid { blocks, threads } = grid;
    let why = if arguments != entry.params.len() {
        format!("{arguments} arguments instead of {}", entry.params.len())
    } else if blocks == 0 || threads == 0 || threads > entry.threads {
        format!("{blocks} blocks of {threads} threads, of 1 to {}", entry.threads)
    } else {
        return Ok(());
    };
    Err(CudaError::Launch { kernel: entry.name, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::scalars::Experts;

    #[test]
    fn grids_and_arguments_that_do_not_fit_are_refused() {
        let entry = Experts::ENTRY;
        let of = |arguments, blocks, threads| {
            fits(&entry, arguments, Grid { blocks, threads }).map_err(|error| error.to_string())
        };
        assert_eq!(of(16, 1, 128), Ok(()));
        let refused = |why| Err(format!("kernel nvfp4_experts cannot be launched: {why}"));
        assert_eq!(of(15, 1, 128), refused("15 arguments instead of 16"));
        assert_eq!(of(16, 1, 129), refused("1 blocks of 129 threads, of 1 to 128"));
        assert_eq!(of(16, 0, 128), refused("0 blocks of 128 threads, of 1 to 128"));
        assert_eq!(of(16, 1, 0), refused("1 blocks of 0 threads, of 1 to 128"));
    }
}
