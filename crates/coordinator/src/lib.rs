//! Loads a large language model's checkpoint onto the ranks of a tensor-parallel server.
//!
//! [`Load`] is where a server begins, whether its ranks are threads of one process or processes of their own:
//!
//! ```
//! use longshore::Load;
//!
//! let loaded = Load::from("synth:llama-bf16").tensor_parallel(2).start()?.wait()?;
//! let ranks = loaded.ranks()?;
//! let embedding = ranks[1].get("model.embed_tokens.weight").expect("every model has one");
//! assert_eq!(embedding.shape, [256, 128]); // this rank's half of the vocabulary
//! # Ok::<(), longshore::LoadError>(())
//! ```
//!
//! | for | there is |
//! |---|---|
//! | ranks that are threads | [`Load::start`] → [`Loading`] → [`Loaded`], reload in place |
//! | ranks that are processes, under whatever launcher | [`Place`], [`Load::join`] → [`Joining`] → [`Rank`], reload in place |
//! | kernels, Python frameworks, servers in another process | [`handover`]: addresses, DLPack, CUDA IPC, and their rules |
//! | servers with a `load_weights(name, tensor)` of their own | [`Load::tensors`] → [`Tensors`] |
//! | knowing beforehand what a load will do | [`Load::plan`] → [`Report`] |
//! | starting processes | [`launch`], or torchrun, srun, Kubernetes |
//!
//! `examples/tp_server` is a whole server over it, `examples/stream.rs` the streaming form.
//!
//! What follows is how it is done, stage by stage; it may change where the above does not.
//!
//! | # | stage | module | in → out |
//! |---|---|---|---|
//! | 1 | checkpoint headers | [`discover`] | directory → configuration and validated headers |
//! | 2 | placement | `longshore_models::placement` | model, headers, group → where each byte belongs |
//! | 3 | assignment | [`assignment`], [`plan`] | placement → who reads what; one checked [`plan::Plan`] |
//! | 4–6 | streaming, exchange, post-processing | `longshore_rank`, started by [`load`](mod@load) in this process, by [`processes`] in others | plan → complete parameters |
//! | 7 | complete ranks, reload in place | [`group`], in other processes [`processes`] | complete parameters of one checkpoint → of another |
//! | – | instead of 2 to 7, for servers that place weights themselves | [`tensors`] | headers → tensors as they are stored, each once |
//! | 8 | results | [`digest`], [`out`], [`report`] | complete parameters → digest, files, JSON, table |
//! | – | the wire between coordinator and ranks in other processes | [`link`], [`secret`] | messages ⇄ messages, heartbeats, how it ended |
//! | – | a process that counts as lost is kept from doing anything more | [`fence`] | which process it was → it is gone |
//! | – | what happens on each rank, for whoever watches | [`events`] | `LONGSHORE_EVENTS` → a line of JSON per event |
//! | – | ranks cut off from storage or from each other on demand | [`cuts`] | `LONGSHORE_CUTS` → reads that fail, links that fall silent |
//! | – | ranks disturbed on purpose, to see what comes of it | [`chaos`] | a launch command → a report of what was lost, and how soon it was not |

mod api;
pub mod assignment;
pub mod cache;
pub mod chaos;
pub mod cli;
mod coordination;
pub mod cuts;
mod device;
pub mod digest;
pub mod discover;
pub mod error;
pub mod events;
pub mod fence;
pub mod group;
pub mod inspect;
pub mod launch;
pub mod link;
pub mod load;
pub mod origin;
pub mod out;
pub mod place;
pub mod plan;
pub mod processes;
#[cfg(feature = "remote")]
mod remote;
pub mod report;
pub mod secret;
#[cfg(test)]
mod simulation;
pub mod source;
mod supervisor;
pub mod synth;
pub mod tensors;
pub mod verify;

pub use longshore_models::{
    Dtype,
    options::{KernelLayout, Quantization},
};
pub use longshore_rank::{protocol::Phase, storage::IoChoice};

pub use self::{
    api::{Joining, Load, Loaded, Loading, OwnParams, Param, Params, Rank, RankProgress, handover},
    device::DeviceChoice,
    error::LoadError,
    place::Place,
    plan::Exchange,
    processes::{OnLoss, Transport},
    report::Report,
    secret::Secret,
    tensors::{Tensor, Tensors, TensorsOptions},
};
