//! The bytes of parameters, wherever they are, and reading them back from a device.

use std::{borrow::Cow, ops::Range, sync::Arc};

use longshore_kernels::cuda::driver::{CudaError, Device, DeviceMemory, Stream};

use crate::{device::Pinned, error::RankError, region::Region};

/// One allocation that holds all parameters of a rank.
#[derive(Debug)]
pub enum Allocation {
    /// In the host's memory.
    Host(Region),
    /// In a device's memory.
    Device(DeviceAllocation),
}

impl Allocation {
    /// The address of its first byte.
    pub fn address(&self) -> u64 {
        match self {
            Allocation::Host(region) => region.at(0, 0).as_ptr() as u64,
            Allocation::Device(allocation) => allocation.memory.address(),
        }
    }

    /// The device that it is on.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match self {
            Allocation::Host(_) => None,
            Allocation::Device(allocation) => Some(allocation.memory.device()),
        }
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Allocation::Host(region) => region.len() as u64,
            Allocation::Device(allocation) => allocation.memory.len(),
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Device memory, and a stream to fill it and to read it back by.
#[derive(Debug)]
pub struct DeviceAllocation {
    memory: DeviceMemory,
    stream: Stream,
}

impl DeviceAllocation {
    pub(super) fn new(device: &Arc<Device>, bytes: u64) -> Result<Self, RankError> {
        Ok(Self { memory: device.allocate("parameters", bytes)?, stream: device.stream()? })
    }

    /// The memory.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Zeroes `(offset, bytes)` ranges and waits for it. Nothing else may use them meanwhile.
    pub(super) fn zero(&self, ranges: impl Iterator<Item = (u64, u64)>) -> Result<(), CudaError> {
        for (offset, bytes) in ranges {
            assert!(offset + bytes <= self.memory.len(), "range leaves the allocation");
            // SAFETY: the range lies within the memory, which lives until the stream has been waited for below.
            unsafe { self.stream.fill(self.memory.address() + offset, 0, bytes) }?;
        }
        self.stream.synchronize()
    }

    /// Copies bytes from each address to a range of `target`, and waits for it. Nobody writes them meanwhile.
    pub(super) fn copy_to_host(
        &self,
        parts: impl Iterator<Item = (u64, Range<usize>)>,
        target: &mut [u8],
    ) -> Result<(), RankError> {
        let first = self.memory.address();
        for (address, range) in parts {
            let (part, bytes) = (&mut target[range.clone()], range.len() as u64);
            assert!(
                address >= first && address + bytes <= first + self.memory.len(),
                "range leaves the allocation"
            );
            // SAFETY: both ranges lie within their memory, which lives until the stream has been waited for below.
            unsafe { self.stream.copy_to_host(part.as_mut_ptr(), address, bytes) }?;
        }
        self.stream.synchronize()?;
        Ok(())
    }

    /// `bytes` bytes from `offset` on.
    pub(super) fn part(&self, offset: u64, bytes: u64) -> DeviceData<'_> {
        assert!(offset + bytes <= self.memory.len(), "range leaves the allocation");
        DeviceData { allocation: self, offset, bytes }
    }
}

/// The bytes of a parameter.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// In the host's memory.
    Host(&'a [u8]),
    /// In a device's memory.
    Device(DeviceData<'a>),
}

impl<'a> Data<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Data::Host(bytes) => bytes.len(),
            Data::Device(data) => data.bytes as usize,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first, in the host's memory or in the device's.
    ///
    /// It stays valid as long as the parameters live, also through a reload, which writes new weights there: whoever uses
    /// it on a device sees to it that no kernel reads while a reload is going on.
    pub fn address(&self) -> u64 {
        match self {
            Data::Host(bytes) => bytes.as_ptr() as u64,
            Data::Device(data) => data.address(),
        }
    }

    /// The bytes, where they are in the host's memory.
    pub fn host(&self) -> Option<&'a [u8]> {
        match self {
            Data::Host(bytes) => Some(bytes),
            Data::Device(_) => None,
        }
    }

    /// The bytes in the host's memory, copied there from a device.
    ///
    /// # Errors
    /// The device fails.
    pub fn to_host(&self) -> Result<Cow<'a, [u8]>, RankError> {
        match self {
            Data::Host(bytes) => Ok(Cow::Borrowed(bytes)),
            Data::Device(data) => {
                let mut bytes = Vec::with_capacity(self.len());
                let mut window = Window::default();
                window.read(Data::Device(*data), |chunk| bytes.extend_from_slice(chunk))?;
                Ok(Cow::Owned(bytes))
            }
        }
    }
}

/// The bytes of a parameter in a device's memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceData<'a> {
    allocation: &'a DeviceAllocation,
    offset: u64,
    bytes: u64,
}

impl<'a> DeviceData<'a> {
    /// The address of the first, in the device's memory.
    pub fn address(&self) -> u64 {
        self.allocation.memory.address() + self.offset
    }

    /// The device.
    pub fn device(&self) -> &'a Arc<Device> {
        self.allocation.memory.device()
    }
}

/// Bytes of a [`Window`]: large enough for a copy to run at full rate.
const WINDOW_BYTES: usize = 4 << 20;

/// Reads parameters in order, those of a device through pinned memory of its own.
#[derive(Debug, Default)]
pub struct Window(Option<DeviceWindow>);

#[derive(Debug)]
struct DeviceWindow {
    pinned: Pinned,
    stream: Stream,
    ordinal: u32,
}

impl Window {
    /// Calls `each` with one piece of `data` after the other.
    ///
    /// # Errors
    /// The device fails.
    pub fn read(&mut self, data: Data<'_>, mut each: impl FnMut(&[u8])) -> Result<(), RankError> {
        let data = match data {
            Data::Host(bytes) => {
                each(bytes);
                return Ok(());
            }
            Data::Device(data) => data,
        };
        let device = data.device();
        let window = match self.0.take().filter(|w| w.ordinal == device.ordinal()) {
            Some(window) => window,
            None => DeviceWindow::new(device)?,
        };
        let window = self.0.insert(window);
        let mut at = 0;
        while at < data.bytes {
            let bytes = (data.bytes - at).min(WINDOW_BYTES as u64);
            each(window.fetch(data.address() + at, bytes)?);
            at += bytes;
        }
        Ok(())
    }
}

impl DeviceWindow {
    fn new(device: &Arc<Device>) -> Result<Self, RankError> {
        let pinned = Pinned::new("reading back", WINDOW_BYTES, device)?;
        Ok(Self { pinned, stream: device.stream()?, ordinal: device.ordinal() })
    }

    /// Copies complete bytes of a device here.
    fn fetch(&mut self, address: u64, bytes: u64) -> Result<&[u8], RankError> {
        let start = self.pinned.at(0, bytes as usize);
        // SAFETY: the caller's data is part of an allocation that outlives this call, which waits for the copy; `&mut self`
        // makes the access to the pinned memory exclusive.
        unsafe { self.stream.copy_to_host(start.as_ptr(), address, bytes) }?;
        self.stream.synchronize()?;
        // SAFETY: the range lies within the pinned memory (checked by `at`) and was just written.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes as usize) })
    }
}
