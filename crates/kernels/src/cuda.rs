//! CUDA twins of the host implementations: their sources, parameters and geometry; and the devices that they run on.
//!
//! The kernels (`cu/*.cu`) are compiled by a pinned compiler (`scripts/build_ptx.sh`) to PTX that is committed
//! (`ptx/*.ptx`) and embedded here; a driver compiles it for its chip. Each equals its host twin byte for byte. Kernels
//! are plain data and arithmetic: only [`driver`] needs a device, and says so by an ordinary error where there is none.
//! [`launch`] puts both together for what a rank does with complete parameters.
//!
//! | kernel | twin | in place | workspace |
//! |---|---|---|---|
//! | [`place`] | strided copies, [`crate::host::cast`] | no | – |
//! | [`permute`] | [`crate::host::rows`], [`crate::host::blocks`] | yes | a run of bytes for each segment of a long cycle |
//! | [`reorder`] | [`crate::host::swizzle`], padded | no | – |
//! | | the same without padding, [`crate::host::shuffle`] | yes | none, or a band for each block of threads |
//! | [`mla`] | [`crate::host::mla`] | no | – |
//! | [`scalars`] | [`crate::host::nvfp4`], [`crate::host::kv`] | values | – |

pub mod driver;
pub mod launch;
pub mod mla;
pub mod permute;
pub mod place;
pub mod reorder;
pub mod scalars;
pub mod table;
