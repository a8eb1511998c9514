//! Runs the kernels of `cu/*.cu` on the host.

use std::sync::OnceLock;

use longshore_emulator::{Kernels, Ran, library_dir};
use longshore_kernels::cuda::table::{Grid, Kernel};

pub(crate) use longshore_emulator::Turns;

/// The kernels as host code.
pub(crate) struct Emulator {
    kernels: Kernels,
}

/// Both orders of blocks and threads.
pub(crate) const TURNS: [Turns; 2] = [Turns::Forwards, Turns::Backwards];

/// The emulator, or `None`, said aloud, where there is no C++ compiler.
pub(crate) fn emulator() -> Option<&'static Emulator> {
    static EMULATOR: OnceLock<Option<Emulator>> = OnceLock::new();
    let open = |library| Emulator { kernels: Kernels::open(library) };
    EMULATOR.get_or_init(|| library_dir(env!("CARGO_TARGET_TMPDIR")).map(open)).as_ref()
}

impl Emulator {
    /// Runs a kernel; addresses among its parameters are host addresses.
    pub(crate) fn launch<K: Kernel>(&self, kernel: &K, grid: Grid, turns: Turns) {
        let (entry, params) = (K::ENTRY, kernel.arguments());
        assert!(grid.threads <= entry.threads && grid.blocks > 0, "{}: {grid:?}", entry.name);
        assert_eq!(params.len(), entry.params.len(), "{}", entry.name);
        // SAFETY: parameters are as many and as large as the entry's, which the PTX confirms; that the addresses among
        // them are valid is what the tests are about.
        let ran =
            unsafe { self.kernels.run(entry.name, grid.blocks, grid.threads, turns, &params) };
        let Ran::ToItsEnd { synchronised } = ran else { panic!("{}: {ran:?}", entry.name) };
        assert!(entry.synchronises || !synchronised, "{}: a barrier unannounced", entry.name);
    }
}
