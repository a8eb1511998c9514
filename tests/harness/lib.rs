//! What the whole-system tests stand on: a generator of checkpoints, an oracle, and a comparison.
//!
//! | module | in → out |
//! |---|---|
//! | [`generator`] | family, scheme, settings → a checkpoint directory, whole or broken |
//! | [`cases`] | the conformance cases: how to generate each, and the options of its load |
//! | [`oracle`] | checkpoint directory, options → what every rank must hold |
//! | [`compare`] | output directory, expectation → equal, or the first differences |
//! | [`scratch`] | a directory that goes away with the test |
//!
//! ```no_run
//! use longshore_harness::{compare, generator::*, oracle, scratch::Scratch};
//!
//! let scratch = Scratch::new()?;
//! let (source, out) = (scratch.join("checkpoint"), scratch.join("out"));
//! Checkpoint::new(Family::KimiK25, Scheme::Int4).seed(1).write(&source)?;
//! let options = oracle::Options::tp(2).kernel_layout("none");
//! let answer = oracle::answer(&source, &options).expect("these shapes are not refused");
//! // … `longshore load` of `source` with `options.arguments()` into `out` …
//! compare::with_answer(&out, &answer).expect("every rank holds what it should");
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! The harness knows nothing of the loader's crates: it is written from the published formats and
//! the contract alone, so that a mistake in the loader is not repeated here.

#![allow(clippy::panic, reason = "test code: a panic is the verdict")]

pub mod cases;
pub mod compare;
pub mod generator;
pub mod oracle;
pub mod scratch;

#[cfg(test)]
mod conformance;
