//! What a checkpoint holds and where each byte belongs. Pure: values in, values out; no I/O, no async, no CUDA.
//!
//! | stage | modules | in → out |
//! |---|---|---|
//! | headers | [`header`], [`index`], [`checkpoint`] | bytes of JSON → [`checkpoint::Checkpoint`] |
//! | configuration | [`config`], [`quant`], [`options`] | `config.json` and options → [`arch::Model`] |
//! | declaration | [`arch`], [`declare`], [`parallel`], [`transform`] | model and group → parameters, tensors, pieces |
//! | placement | [`placement`] | declaration and checkpoint → proven [`placement::Placement`] |
//! | recovery | [`have`] | which bytes of a checkpoint a rank has already |
//! | names alone | [`mapping`] | model → the parameter, shard and expert of a tensor's name, and back |
//!
//! "Reference §n" in these docs points to the description of SGLang's loader that this project was written from;
//! "contract" to the project's description of its command line and files.

pub use dtype::Dtype;

pub mod arch;
pub mod byte_range;
pub mod checkpoint;
pub mod config;
pub mod declare;
pub mod dtype;
pub mod error;
pub mod have;
pub mod header;
pub mod index;
pub mod mapping;
pub mod options;
pub mod parallel;
pub mod placement;
pub mod quant;
pub mod transform;
