//! CUDA twins of the host implementations: their sources, parameters and geometry. What launches them comes with the device.
//!
//! The kernels (`cu/*.cu`) are compiled by a pinned compiler (`scripts/build_ptx.sh`) to PTX that is committed (`ptx/*.ptx`)
//! and embedded here; a driver compiles it for its chip. Each equals its host twin byte for byte. Everything in this module
//! is plain data and arithmetic: nothing needs a device, a driver or CUDA.
//!
//! | kernel | twin | in place | workspace |
//! |---|---|---|---|
//! | [`place`] | strided copies, [`crate::host::cast`] | no | – |
//! | [`permute`] | [`crate::host::rows`], [`crate::host::blocks`] | yes | a run of bytes for each segment of a long cycle |
//! | [`reorder`] | [`crate::host::swizzle`], padded | no | – |
//! | | the same without padding, [`crate::host::shuffle`] | yes | none, or a band for each block of threads |
//! | [`mla`] | [`crate::host::mla`] | no | – |
//! | [`scalars`] | [`crate::host::nvfp4`], [`crate::host::kv`] | values | – |

pub mod mla;
pub mod permute;
pub mod place;
pub mod reorder;
pub mod scalars;
pub mod table;
