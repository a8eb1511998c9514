//! Element types: the names that headers use, and their sizes.

pub use safetensors::Dtype;

/// Bytes of one element.
///
/// Types smaller than a byte count as 0; no parameter has one (packed formats are U8 or I32 here).
pub fn elem_bytes(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}
