//! Loads a large language model's checkpoint onto the ranks of a tensor-parallel server.
//!
//! | # | stage | module | in → out |
//! |---|---|---|---|
//! | 1 | checkpoint headers | [`discover`] | directory → configuration and validated headers |
//! | 2 | placement | `longshore_models::placement` | model, headers, group → where each byte belongs |
//! | 3 | assignment | [`assignment`], [`plan`] | placement → who reads what; one checked [`plan::Plan`] |
//! | 4–6 | streaming, exchange, post-processing | `longshore_rank`, started by [`load`](mod@load) | plan → complete parameters |
//! | 7 | complete ranks, reload in place | [`group`] | complete parameters of one checkpoint → of another |
//! | – | instead of 2 to 7, for servers that place weights themselves | [`tensors`] | headers → tensors as they are stored, each once |
//! | 8 | results | [`digest`], [`out`], [`report`] | complete parameters → digest, files, JSON, table |
//! | – | the wire between coordinator and ranks in other processes | [`link`], [`secret`] | messages ⇄ messages, heartbeats, how it ended |
//!
//! Where ranks are processes, [`launch`] starts them, and each finds its [`place`].
//!
//! ```
//! use longshore::{discover::discover, load, plan, synth};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! synth::Synth::new("llama", "bf16").scale(synth::Scale::Tiny).write(dir.path())?;
//!
//! let options = plan::PlanOptions { tp: 2, ..plan::PlanOptions::default() };
//! let plan = plan::Plan::new(discover(dir.path())?, &options)?;
//! let runtime = tokio::runtime::Runtime::new()?;
//! let progress = load::progress_of(&plan);
//! let group = runtime.block_on(load::load(&plan, &load::RunOptions::default(), progress))?;
//!
//! let first = group.ranks()?[1].iter().next().expect("a model has parameters");
//! assert_eq!((first.name, first.shape), ("model.embed_tokens.weight", &[256, 128][..]));
//! # Ok(())
//! # }
//! ```

pub mod assignment;
pub mod cli;
pub mod digest;
pub mod discover;
pub mod error;
pub mod group;
pub mod inspect;
pub mod launch;
pub mod link;
pub mod load;
pub mod out;
pub mod place;
pub mod plan;
pub mod processes;
pub mod report;
pub mod secret;
pub mod source;
mod supervisor;
pub mod synth;
pub mod tensors;
