//! What a launch needs to know: entry names, PTX, parameters, grids.

use std::ffi::c_void;

/// A kernel as its PTX has it.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The name of the entry.
    pub name: &'static str,
    /// The module that holds it.
    pub ptx: &'static str,
    /// Bytes of each parameter, in order: 8 for addresses and large sizes, 4 for the others.
    pub params: &'static [usize],
    /// Threads of a block, at most.
    pub threads: u32,
    /// Whether its threads wait for each other.
    pub synchronises: bool,
}

/// All kernels.
pub const ENTRIES: [Entry; 15] = [
    super::place::Place::ENTRY,
    super::permute::Save::ENTRY,
    super::permute::Move::ENTRY,
    super::reorder::Swizzle::ENTRY,
    super::reorder::SwizzleInPlace::ENTRY,
    super::reorder::ShuffleScales::ENTRY,
    super::reorder::ShuffleWeights::ENTRY,
    super::mla::Bf16::ENTRY,
    super::mla::F16::ENTRY,
    super::mla::F32::ENTRY,
    super::mla::Fp8::ENTRY,
    super::mla::Mxfp4::ENTRY,
    super::scalars::Linear::ENTRY,
    super::scalars::Experts::ENTRY,
    super::scalars::KvScales::ENTRY,
];

/// The parameters of a kernel; those named by an address are in device memory.
pub trait Kernel {
    /// The kernel.
    const ENTRY: Entry;

    /// Where each parameter is, in the order of the entry; for a launch while `self` is borrowed.
    fn arguments(&self) -> Vec<*const c_void>;
}

/// Blocks and threads of a launch; no kernel asks for dynamic shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks.
    pub blocks: u32,
    /// Threads of each.
    pub threads: u32,
}

/// What of a device decides grids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Its multiprocessors.
    pub multiprocessors: u32,
}

/// Threads that one multiprocessor holds at a time, at least, of all chips from compute 7.5 on. Source: CUDA C++
/// Programming Guide, table of technical specifications per compute capability.
const RESIDENT_THREADS: u32 = 1024;

impl Device {
    /// A grid for `items` of work, of which each thread takes one at a time: enough blocks for all, but no more than four
    /// times what is resident, as loops do the rest.
    pub fn grid(&self, items: u64, threads: u32) -> Grid {
        let most = u64::from(4 * self.resident_blocks(threads));
        let blocks = items.div_ceil(u64::from(threads)).clamp(1, most);
        // no more than `most`, which is a product of small numbers
        Grid { blocks: blocks as u32, threads }
    }

    /// Blocks of `threads` threads that are resident at a time, at least.
    pub fn resident_blocks(&self, threads: u32) -> u32 {
        self.multiprocessors.max(1) * (RESIDENT_THREADS / threads).max(1)
    }

    /// A grid of which each block takes one of `bands` at a time.
    pub fn grid_of_bands(&self, bands: u64, threads: u32) -> Grid {
        self.grid(bands.saturating_mul(u64::from(threads)), threads)
    }
}

/// Declares the parameters of a kernel, and the kernel with them.
macro_rules! kernel {
    (
        $(#[$doc:meta])*
        $kernel:ident = $entry:literal in $ptx:expr, $threads:expr $(, $synchronises:ident)?;
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default)]
        pub struct $kernel {
            $($(#[$field_doc])* pub $field: $kind,)*
        }

        impl $kernel {
            /// The kernel.
            pub const ENTRY: $crate::cuda::table::Entry = $crate::cuda::table::Entry {
                name: $entry,
                ptx: $ptx,
                params: &[$(size_of::<$kind>(),)*],
                threads: $threads,
                synchronises: [$(stringify!($synchronises),)? ""].len() == 2,
            };
        }

        impl $crate::cuda::table::Kernel for $kernel {
            const ENTRY: $crate::cuda::table::Entry = Self::ENTRY;

            fn arguments(&self) -> Vec<*const std::ffi::c_void> {
                vec![$((&raw const self.$field).cast(),)*]
            }
        }
    };
}
pub(super) use kernel;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Bytes of the parameters of `name` in `ptx`, and threads of a block where it says so.
    fn declared(ptx: &str, name: &str) -> Option<(Vec<usize>, Option<u32>)> {
        let start = ptx.find(&format!(".entry {name}("))?;
        let (params, rest) = ptx[start..].split_once('(')?.1.split_once(')')?;
        let bytes = |param: &str| match param.split_whitespace().nth(1) {
            Some(".u64") => 8,
            Some(".u32") => 4,
            other => panic!("{name}: parameter of kind {other:?}"),
        };
        let params = params.split(',').map(bytes).collect();
        let head = rest.split_once('{')?.0;
        let threads = head.split_once(".maxntid").and_then(|(_, rest)| {
            rest.split([',', '\n']).next().map(|n| n.trim().parse().expect("a number"))
        });
        Some((params, threads))
    }

    /// Every kernel is in its PTX with these parameters and this size of block, and the PTX holds no others.
    #[test]
    fn entries_are_as_their_ptx_declares_them() {
        let mut modules = HashSet::new();
        for entry in ENTRIES {
            let (params, threads) = declared(entry.ptx, entry.name).expect(entry.name);
            assert_eq!(params, entry.params, "{}", entry.name);
            assert!(threads.is_none_or(|n| n == entry.threads), "{}: {threads:?}", entry.name);
            modules.insert(entry.ptx);
        }
        let declared: usize = modules.iter().map(|ptx| ptx.matches(".entry ").count()).sum();
        assert_eq!(declared, ENTRIES.len());
    }

    /// Old enough for every driver since CUDA 12.8 and every chip since Turing.
    #[test]
    fn ptx_is_of_the_pinned_compiler() {
        for entry in ENTRIES {
            let has = |line: &str| entry.ptx.lines().any(|l| l == line);
            assert!(has(".version 8.7") && has(".target sm_75"), "{}", entry.name);
            // one rounding per operation, subnormals kept
            assert!(!entry.ptx.contains("fma.rn"), "{}: fused", entry.name);
            assert!(!entry.ptx.contains(".ftz"), "{}: subnormals flushed", entry.name);
            assert!(!entry.ptx.contains(".approx"), "{}: estimated", entry.name);
        }
    }

    #[test]
    fn grids_cover_the_work_and_fit_the_device() {
        let device = Device { multiprocessors: 132 };
        assert_eq!(device.grid(0, 256), Grid { blocks: 1, threads: 256 });
        assert_eq!(device.grid(257, 256), Grid { blocks: 2, threads: 256 });
        assert_eq!(device.grid(u64::MAX, 256), Grid { blocks: 132 * 16, threads: 256 });
        assert_eq!(device.grid_of_bands(3, 512), Grid { blocks: 3, threads: 512 });
        assert_eq!(device.grid_of_bands(u64::MAX, 512).blocks, 132 * 8);
        assert_eq!(Device { multiprocessors: 0 }.grid(1000, 256).blocks, 4);
    }
}
