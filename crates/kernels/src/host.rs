//! Host implementations: plain loops over byte slices, the definition of every transform.

pub mod blocks;
pub mod cast;
pub mod float;
pub mod kv;
pub mod mla;
pub mod nvfp4;
pub mod permute;
pub mod rows;
pub mod shuffle;
pub mod swizzle;
mod wide;
mod words;
