//! Typed launches: the right kernels with the right grids, in order, for what is to be done.
//!
//! A caller brings addresses in device memory and shapes; what kernels ask for besides (alignment, whole tiles, tables,
//! workspace) is checked or seen to here. What does not fit is a [`CudaError::Launch`], before anything is launched.
//!
//! | `longshore_models::transform::Finish` | launched by | workspace |
//! |---|---|---|
//! | `Reorder`: rows, blocks, swizzled, tiles | [`Permutations::reorder`] | [`Permutations::workspace`] |
//! | `SwizzleInto` | [`swizzle_into`] | – |
//! | `MlaSplit` | [`mla_split`] | – |
//! | `LinearScalars`, `ExpertScalars`, `KvScales` | [`linear_scalars`], [`expert_scalars`], [`kv_scales`] | – |
//!
//! and [`place`] for the spans of a slab. A launch that has returned has been queued, not done: what it reads and
//! writes, tables and workspace too, stays as it is until the stream has got there. Launches on one stream can use one
//! workspace.

use super::{
    driver::{CudaError, DeviceMemory, Stream},
    place::{Place, SpanTable},
    table::{Device, Entry, Grid, Kernel},
};

mod permutation;
mod reorder;
mod values;

pub use permutation::{DevicePermutation, Permutation, Permutations, permute};
pub use reorder::{Reorder, reorder, swizzle_into};
pub use values::{MlaWeight, expert_scalars, kv_scales, linear_scalars, mla_split};

/// What kernels are launched on: a stream of a device, or something that does as one would.
pub trait Launch {
    /// What decides grids.
    fn geometry(&self) -> Device;

    /// Launches a kernel.
    ///
    /// # Safety
    /// As [`Stream::launch`].
    ///
    /// # Errors
    /// As [`Stream::launch`].
    unsafe fn launch<K: Kernel>(&self, kernel: &K, grid: Grid) -> Result<(), CudaError>;
}

impl Launch for Stream {
    fn geometry(&self) -> Device {
        self.device().geometry()
    }

    unsafe fn launch<K: Kernel>(&self, kernel: &K, grid: Grid) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { Stream::launch(self, kernel, grid) }
    }
}

/// Device memory that a launch may write to as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Workspace {
    /// Where it starts, a multiple of 16.
    pub address: u64,
    /// Bytes of it.
    pub bytes: u64,
}

impl From<&DeviceMemory> for Workspace {
    fn from(memory: &DeviceMemory) -> Workspace {
        Workspace { address: memory.address(), bytes: memory.len() }
    }
}

/// How much workspace a launch can do with: with less than the most, it does one part after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkspaceBytes {
    /// It fails with less.
    pub least: u64,
    /// More is not used.
    pub most: u64,
}

impl WorkspaceBytes {
    /// For either of two launches.
    pub fn or(self, other: WorkspaceBytes) -> WorkspaceBytes {
        WorkspaceBytes { least: self.least.max(other.least), most: self.most.max(other.most) }
    }
}

/// Places the spans of a slab.
///
/// # Safety
/// `spans` is device memory with the table's spans; `slab` and targets are as [`Place`] says, and nobody else reads or
/// writes the targets, or writes to the slab or the table, until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when the slab is no multiple of 16 or the table none of 8, or what the driver says.
pub unsafe fn place(
    on: &impl Launch,
    slab: u64,
    spans: u64,
    table: &SpanTable,
) -> Result<(), CudaError> {
    let Some(grid) = table.grid(on.geometry()) else { return Ok(()) };
    let of = Checks(&Place::ENTRY);
    of.aligned("the slab", slab, 16)?;
    of.aligned("the table", spans, 8)?;
    let span_count = of.dimension("spans", table.spans().len() as u64)?;
    let kernel = Place { slab, spans, span_count, unit_count: table.unit_count() };
    // SAFETY: passed on from the caller; alignment is checked, and the counts are the table's.
    unsafe { on.launch(&kernel, grid) }
}

/// What a kernel asks of its parameters.
#[derive(Clone, Copy)]
struct Checks(&'static Entry);

impl Checks {
    fn refused<T>(self, why: impl Into<String>) -> Result<T, CudaError> {
        Err(CudaError::Launch { kernel: self.0.name, why: why.into() })
    }

    fn aligned(self, what: &str, address: u64, to: u64) -> Result<(), CudaError> {
        if address % to == 0 {
            return Ok(());
        }
        self.refused(format!("{what} at {address:#x}, which is no multiple of {to}"))
    }

    fn whole(self, what: &str, count: u64, of: u64) -> Result<(), CudaError> {
        if count % of == 0 {
            return Ok(());
        }
        self.refused(format!("{count} {what}, which is no multiple of {of}"))
    }

    /// A dimension as kernels take it: below 2³⁰, so that they can round it up and double it.
    fn dimension(self, what: &str, count: u64) -> Result<u32, CudaError> {
        match u32::try_from(count) {
            Ok(count) if count < 1 << 30 => Ok(count),
            _ => self.refused(format!("{count} {what}, 2^30 or more")),
        }
    }

    /// That there is enough workspace where any is needed.
    fn workspace(self, workspace: Workspace, least: u64) -> Result<(), CudaError> {
        if least == 0 {
            return Ok(());
        }
        self.aligned("workspace", workspace.address, 16)?;
        if workspace.bytes >= least {
            return Ok(());
        }
        self.refused(format!("{} bytes of workspace, {least} are needed", workspace.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_said_with_its_numbers() {
        let of = Checks(&Place::ENTRY);
        let text = |outcome: Result<(), CudaError>| outcome.unwrap_err().to_string();
        let refused = |why| format!("kernel place cannot be launched: {why}");
        assert_eq!(of.aligned("the slab", 32, 16), Ok(()));
        let why = "the slab at 0x18, which is no multiple of 16";
        assert_eq!(text(of.aligned("the slab", 24, 16)), refused(why));
        let why = "100 rows, which is no multiple of 32";
        assert_eq!(text(of.whole("rows", 100, 32)), refused(why));
        assert_eq!(of.dimension("rows", (1 << 30) - 1), Ok((1 << 30) - 1));
        let why = "1073741824 rows, 2^30 or more";
        assert_eq!(text(of.dimension("rows", 1 << 30).map(|_| ())), refused(why));
        let workspace = Workspace { address: 256, bytes: 10 };
        assert_eq!(of.workspace(Workspace { address: 1, bytes: 0 }, 0), Ok(()));
        let why = "10 bytes of workspace, 11 are needed";
        assert_eq!(text(of.workspace(workspace, 11)), refused(why));
    }

    #[test]
    fn a_workspace_for_either_is_enough_for_both() {
        let (a, b) = (WorkspaceBytes { least: 1, most: 9 }, WorkspaceBytes { least: 2, most: 3 });
        assert_eq!(a.or(b), WorkspaceBytes { least: 2, most: 9 });
    }
}
