//! Parameter memory of one rank: where each parameter lies and how many of its bytes are still missing.

pub mod data;
pub mod dlpack;

use std::{
    collections::HashMap,
    ptr::NonNull,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use longshore_kernels::cuda::driver::Device;
use longshore_models::{
    Dtype,
    declare::ParamId,
    have::Kept,
    placement::{Placement, Span},
};

use crate::{
    error::RankError,
    params::data::{Allocation, Data, DeviceAllocation},
    region::Region,
};

/// Parameters start on this boundary: what vector loads and device copies like.
const ALIGNMENT: u64 = 512;

/// Where the parameters of a rank live.
#[derive(Debug, Clone)]
pub enum Home {
    /// In the host's memory.
    Host,
    /// In the memory of a device.
    Device(Arc<Device>),
}

/// One rank's parameters in one allocation; addresses never change.
#[derive(Debug)]
pub struct ParamMemory {
    placement: Arc<Placement>,
    allocation: Arc<Allocation>,
    offsets: Vec<u64>,
    /// Bytes still to land, per parameter.
    missing: Vec<AtomicU64>,
}

impl ParamMemory {
    /// Allocates the parameters of `rank`. Where no piece will write, they are zero.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn new(placement: Arc<Placement>, rank: u32, home: &Home) -> Result<Self, RankError> {
        let (offsets, bytes) = offsets(&placement);
        let allocation = match home {
            Home::Host => Allocation::Host(Region::new("parameters", bytes as usize)?),
            Home::Device(device) => Allocation::Device(DeviceAllocation::new(device, bytes)?),
        };
        let missing = placement.landing_bytes(rank).into_iter().map(AtomicU64::new).collect();
        let this = Self { placement, allocation: Arc::new(allocation), offsets, missing };
        // the system zeroes what it gives out, a device does not
        if let Allocation::Device(allocation) = &*this.allocation {
            this.zero_padded(rank, allocation, &Kept::default())?;
        }
        Ok(this)
    }

    /// Gets ready to be written again, in place, by a load of `placement`: every byte counts as missing, and padding,
    /// which post-processing may have moved, is zero where no piece of `placement` will write. Parameters that are `kept` stay
    /// complete as they are.
    ///
    /// Takes `&mut self`, so that nobody else reads or writes meanwhile (RNK-5). `placement` has the same parameters
    /// ([`Placement::same_parameters`]).
    ///
    /// # Errors
    /// The device fails.
    pub fn begin_again(
        &mut self,
        placement: Arc<Placement>,
        rank: u32,
        kept: &Kept,
    ) -> Result<(), RankError> {
        let landing = (0..).zip(placement.landing_bytes(rank));
        let missing = landing.map(|(param, bytes)| if kept.has(param) { 0 } else { bytes });
        self.missing = missing.map(AtomicU64::new).collect();
        self.placement = placement;
        match &*self.allocation {
            Allocation::Device(allocation) => self.zero_padded(rank, allocation, kept),
            Allocation::Host(region) => {
                self.placement.padding(rank, |param, range| {
                    if kept.has(param) {
                        return;
                    }
                    let start = (self.offsets[param as usize] + range.start) as usize;
                    let bytes = range.len() as usize;
                    region.touch(start, bytes);
                    // SAFETY: `at` checks that the range lies within the region; `&mut self` makes the access exclusive.
                    unsafe { region.at(start, bytes).as_ptr().write_bytes(0, bytes) };
                });
                Ok(())
            }
        }
    }

    /// Zeroes, as a whole, the parameters that have padding and are not `kept`: nothing has landed yet, and one large fill is
    /// cheaper than one for each row.
    fn zero_padded(
        &self,
        rank: u32,
        allocation: &DeviceAllocation,
        kept: &Kept,
    ) -> Result<(), RankError> {
        let mut padded = vec![false; self.offsets.len()];
        self.placement.padding(rank, |param, _| padded[param as usize] = !kept.has(param));
        let ranges = padded.iter().enumerate().filter(|(_, padded)| **padded);
        allocation
            .zero(ranges.map(|(i, _)| (self.offsets[i], self.placement.params[i].bytes)))
            .map_err(RankError::from)
    }

    /// What holds the parameters.
    pub fn allocation(&self) -> &Arc<Allocation> {
        &self.allocation
    }

    /// The device that the parameters live on.
    pub fn device(&self) -> Option<&Arc<Device>> {
        self.allocation.device()
    }

    /// The host's memory that holds the parameters.
    ///
    /// # Panics
    /// They live on a device: a bug, as each way of loading is for one home.
    fn region(&self) -> &Region {
        match &*self.allocation {
            Allocation::Host(region) => region,
            Allocation::Device(_) => unreachable!("these parameters live on a device"),
        }
    }

    /// The address of a parameter's first byte, in the host's or in the device's memory.
    pub fn address(&self, param: ParamId) -> u64 {
        self.allocation.address() + self.offsets[param as usize]
    }

    /// Where `span` lands: the address of its first byte, in the host's or in the device's memory.
    ///
    /// # Panics
    /// When the span would leave its parameter.
    pub fn span_address(&self, span: &Span) -> u64 {
        self.extent(span);
        self.address(span.param) + span.target_offset
    }

    /// Bytes from the first of `span`'s runs to the end of the last.
    ///
    /// # Panics
    /// When the span would leave its parameter.
    fn extent(&self, span: &Span) -> u64 {
        let extent = match span.rows {
            0 => 0,
            rows => (rows - 1) * span.target_stride + span.target_width(),
        };
        let end = span.target_offset + extent;
        assert!(
            end <= self.placement.params[span.param as usize].bytes,
            "span leaves its parameter"
        );
        extent
    }

    /// The placement that this memory was filled by, or is being filled by.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Bytes of `param` that have not landed yet.
    pub fn missing(&self, param: ParamId) -> u64 {
        self.missing[param as usize].load(Ordering::Acquire)
    }

    /// Records that `bytes` bytes of `param` have been written; `true` when they were the last ones.
    ///
    /// # Errors
    /// More bytes than were missing: the plan or its execution is wrong, and the parameter must not be used.
    pub fn landed(&self, param: ParamId, bytes: u64) -> Result<bool, RankError> {
        // AcqRel: whoever lands the last byte sees all writes that landed before it
        let before = self.missing[param as usize].fetch_sub(bytes, Ordering::AcqRel);
        if before < bytes {
            return Err(RankError::OverfullParam {
                param: self.placement.params[param as usize].name.clone(),
                found: bytes,
                expected: before,
            });
        }
        Ok(before == bytes && bytes > 0)
    }

    /// Where `span` lands in the host's memory: address of its first run, all of its extent resident and ready to be written.
    ///
    /// # Panics
    /// When the span would leave its parameter, or the parameters live on a device.
    pub fn span_target(&self, span: &Span) -> NonNull<u8> {
        let offset = (self.offsets[span.param as usize] + span.target_offset) as usize;
        let (region, extent) = (self.region(), self.extent(span) as usize);
        region.touch(offset, extent);
        region.at(offset, extent)
    }

    /// Copies a span's bytes from where they have landed to where they came from: `source`, of which the span's source
    /// offsets count.
    ///
    /// # Safety
    /// The bytes have landed, were not converted, and nobody writes them.
    ///
    /// # Errors
    /// The device fails.
    pub unsafe fn copy_back(&self, span: &Span, source: &mut [u8]) -> Result<(), RankError> {
        let row = |row: u64| {
            let from = (span.source_offset + row * span.source_stride) as usize;
            (row * span.target_stride, from..from + span.width as usize)
        };
        match &*self.allocation {
            Allocation::Host(_) => {
                let first = self.span_target(span).as_ptr();
                for (offset, into) in (0..span.rows).map(row) {
                    // SAFETY: `span_target` checked the extent of the span; by the caller's promise its bytes are not written.
                    let bytes = unsafe {
                        std::slice::from_raw_parts(first.wrapping_add(offset as usize), into.len())
                    };
                    source[into].copy_from_slice(bytes);
                }
                Ok(())
            }
            Allocation::Device(allocation) => {
                let first = self.span_address(span);
                let rows = (0..span.rows).map(row);
                allocation.copy_to_host(rows.map(|(offset, into)| (first + offset, into)), source)
            }
        }
    }

    /// The bytes of `param`, which is in the host's memory.
    ///
    /// # Safety
    /// No byte of the parameter may be written while the slice lives: it is complete (RNK-2), and nothing that writes
    /// it again (post-processing in place, a reload) runs meanwhile.
    pub unsafe fn bytes(&self, param: ParamId) -> &[u8] {
        let bytes = self.placement.params[param as usize].bytes as usize;
        let start = self.region().at(self.offsets[param as usize] as usize, bytes);
        // SAFETY: the range is within the region (checked by `at`), initialised (anonymous memory is zeroed), and by
        // the caller's promise not written.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }

    /// The bytes of `param`, which is in the host's memory, to be written.
    ///
    /// # Safety
    /// Nothing else may read or write the parameter while the slice lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "disjoint parts of one region; the caller promises exclusivity"
    )]
    pub unsafe fn bytes_mut(&self, param: ParamId) -> &mut [u8] {
        let (region, offset) = (self.region(), self.offsets[param as usize] as usize);
        let bytes = self.placement.params[param as usize].bytes as usize;
        // of a derived parameter no byte has landed, so nobody has touched it
        region.touch(offset, bytes);
        let start = region.at(offset, bytes);
        // SAFETY: as in `bytes`; exclusivity is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), bytes) }
    }
}

/// One finished parameter.
#[derive(Debug, Clone, Copy)]
pub struct ParamView<'a> {
    /// The runtime's name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Rank-local shape.
    pub shape: &'a [u64],
    /// The bytes, on the host or on a device; their address stays the same as long as the parameters live.
    pub data: Data<'a>,
    allocation: &'a Arc<Allocation>,
    offset: u64,
}

impl ParamView<'_> {
    /// Bytes from the start of the one allocation that holds all parameters of the rank.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// The finished parameters of one rank. Exists only for a rank that is complete, and is the only way to read them; a
/// reload takes it away ([`ReadyParams::into_memory`]) and gives a new one when it is complete.
#[derive(Debug)]
pub struct ReadyParams {
    /// The rank.
    pub rank: u32,
    memory: Arc<ParamMemory>,
    /// Parameters by name, second names included; made when first asked for.
    by_name: OnceLock<HashMap<String, ParamId>>,
}

impl ReadyParams {
    /// Wraps the memory of a rank whose load has ended; `None` while any byte is missing.
    pub(crate) fn new(rank: u32, memory: Arc<ParamMemory>) -> Option<Self> {
        let complete = (0..memory.missing.len()).all(|p| memory.missing(p as ParamId) == 0);
        complete.then_some(Self { rank, memory, by_name: OnceLock::new() })
    }

    /// Gives up the right to read, and with it the memory.
    pub fn into_memory(self) -> Arc<ParamMemory> {
        self.memory
    }

    /// Whether they are all that is left of their load: its threads have ended, and what it set aside was given back.
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }

    /// What holds the parameters.
    pub fn allocation(&self) -> &Allocation {
        &self.memory.allocation
    }

    /// Bytes of memory that the parameters take, the gaps between them included.
    pub fn allocated_bytes(&self) -> u64 {
        self.memory.allocation.len()
    }

    /// All parameters, in model order.
    pub fn iter(&self) -> impl Iterator<Item = ParamView<'_>> {
        (0..self.memory.placement().params.len()).map(|i| self.view(i as ParamId))
    }

    /// A parameter by its name, or by a second name that shares its storage.
    pub fn get(&self, name: &str) -> Option<ParamView<'_>> {
        let placement = self.memory.placement();
        let by_name = self.by_name.get_or_init(|| {
            let own = placement.params.iter().enumerate();
            let own = own.map(|(i, param)| (param.name.clone(), i as ParamId));
            let second = placement.aliases.iter().map(|a| (a.name.clone(), a.source));
            own.chain(second).collect()
        });
        by_name.get(name).map(|param| self.view(*param))
    }

    fn view(&self, id: ParamId) -> ParamView<'_> {
        let param = &self.memory.placement().params[id as usize];
        let (allocation, offset) = (&self.memory.allocation, self.memory.offsets[id as usize]);
        let data = match &**allocation {
            // SAFETY: `new` saw every byte landed, and a `ReadyParams` is only made when the rank's workers have
            // nothing left to write.
            Allocation::Host(_) => Data::Host(unsafe { self.memory.bytes(id) }),
            Allocation::Device(allocation) => Data::Device(allocation.part(offset, param.bytes)),
        };
        let (name, shape) = (&param.name, &param.shape);
        ParamView { name, dtype: param.dtype, shape, data, allocation, offset }
    }

    /// Second names: `(derived name, name of the parameter whose storage it shares)`.
    pub fn aliases(&self) -> impl Iterator<Item = (&str, &str)> {
        let placement = self.memory.placement();
        placement
            .aliases
            .iter()
            .map(|a| (a.name.as_str(), placement.params[a.source as usize].name.as_str()))
    }
}

/// Where each parameter begins, and the bytes that all of them take, the gaps between them included.
fn offsets(placement: &Placement) -> (Vec<u64>, u64) {
    let mut offsets = Vec::with_capacity(placement.params.len());
    let mut end = 0u64;
    for param in &placement.params {
        offsets.push(end);
        end = (end + param.bytes).next_multiple_of(ALIGNMENT);
    }
    (offsets, end)
}

/// Bytes that the parameters of one rank take in memory, the gaps between them included.
pub fn memory_bytes(placement: &Placement) -> u64 {
    offsets(placement).1
}
