//! The small API: what a server needs to load a checkpoint onto its ranks, and nothing of how it is done.

pub mod handover;
mod params;
mod process;
mod threads;

use std::{path::PathBuf, time::Duration};

use longshore_models::options::{KernelLayout, Quantization};
use longshore_rank::storage::IoChoice;

pub use self::{
    params::{Param, Params},
    process::{Joining, OwnParams, Rank},
    threads::{Loaded, Loading, RankProgress},
};
use crate::{
    cache::weights::KeepWeights,
    device::DeviceChoice,
    discover::discover,
    error::LoadError,
    load::RunOptions,
    plan::{Exchange, Plan, PlanOptions},
    processes::{GroupOptions, OnLoss, TIME_LIMITS, Transport},
    report::{RanksAs, Report},
    source,
    tensors::{Tensors, TensorsOptions},
};

/// A load to be carried out: where from, for how many ranks, finished for which kernels.
///
/// The ranks are threads of this process ([`Load::start`]), or this process is one of them ([`Load::join`]):
///
/// ```
/// use longshore::Load;
///
/// let loaded = Load::from("synth:llama-bf16").tensor_parallel(4).start()?.wait()?;
/// for rank in loaded.ranks()? {
///     let qkv = rank.get("model.layers.0.self_attn.qkv_proj.weight").expect("a Llama has it");
///     println!("rank {}: {} {:?} at {:#x}", rank.rank(), qkv.dtype, qkv.shape, qkv.data.address());
/// }
/// # Ok::<(), longshore::LoadError>(())
/// ```
///
/// The source is what the command line takes: a directory, or `synth:FAMILY-SCHEME`.
#[derive(Debug, Clone)]
pub struct Load {
    source: String,
    tensor_parallel: Option<u32>,
    memory_limit: Option<u64>,
    keep: Option<KeepWeights>,
    plan: PlanOptions,
    run: RunOptions,
    group: GroupOptions,
}

impl Load {
    /// A load of `source` with everything as the command line has it by default.
    pub fn from(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            tensor_parallel: None,
            memory_limit: None,
            keep: None,
            plan: PlanOptions::default(),
            run: RunOptions::default(),
            group: GroupOptions::default(),
        }
    }

    /// For so many ranks. Without it: one with [`Load::start`], as many as there are processes with [`Load::join`].
    pub fn tensor_parallel(mut self, ranks: u32) -> Self {
        self.tensor_parallel = Some(ranks);
        self
    }

    /// With experts spread over groups of `tensor_parallel / ranks`; divides the tensor-parallel size.
    pub fn expert_parallel(mut self, ranks: u32) -> Self {
        self.plan.ep = ranks;
        self
    }

    /// Finished for these kernels rather than for those that the quantisation needs.
    pub fn kernel_layout(mut self, layout: KernelLayout) -> Self {
        self.plan.model.kernel_layout = Some(layout);
        self
    }

    /// With what quantised modules are stored in, whatever the checkpoint's files declare.
    pub fn quantization(mut self, method: Quantization) -> Self {
        self.plan.model.quantization = Some(method);
        self
    }

    /// With the shared expert as the last routed one.
    pub fn fuse_shared_experts(mut self) -> Self {
        self.plan.model.fuse_shared_experts = true;
        self
    }

    /// The prediction layer as the draft model, and nothing else.
    pub fn draft(mut self) -> Self {
        self.plan.model.draft = true;
        self
    }

    /// Without the vision tower.
    pub fn language_only(mut self) -> Self {
        self.plan.model.language_only = true;
        self
    }

    /// The vision tower alone.
    pub fn encoder_only(mut self) -> Self {
        self.plan.model.encoder_only = true;
        self
    }

    /// Skipping tensors that belong to no parameter, with a warning.
    pub fn allow_unknown(mut self) -> Self {
        self.plan.model.allow_unknown = true;
        self
    }

    /// Whether ranks pass bytes to each other, so that each is read once.
    pub fn exchange(mut self, exchange: Exchange) -> Self {
        self.plan.exchange = exchange;
        self
    }

    /// With at most so many bytes of staging memory on each rank, beside its parameters.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// Keeping in `dir` what is read of weights that are elsewhere, so that the next load of this host reads it there; at most
    /// `limit_bytes` for all models together, or as much as there is. Several processes may share it. Of a source on this host
    /// nothing is kept.
    pub fn cache(mut self, dir: impl Into<PathBuf>, limit_bytes: impl Into<Option<u64>>) -> Self {
        self.keep = Some(KeepWeights { dir: dir.into(), limit_bytes: limit_bytes.into() });
        self
    }

    /// With so many reads in flight on each rank.
    pub fn concurrency(mut self, reads: usize) -> Self {
        self.run.concurrency = Some(reads);
        self
    }

    /// Through the page cache or past it, rather than as each file's state suggests.
    pub fn io(mut self, choice: IoChoice) -> Self {
        self.run.io = choice;
        self
    }

    /// After every weight file was verified against what its source publishes, which reads it once more.
    pub fn verify(mut self) -> Self {
        self.run.verify = true;
        self
    }

    /// With parameters on devices rather than in the host's memory, where they live unless this is asked for.
    pub fn device(mut self, choice: DeviceChoice) -> Self {
        self.run.device = choice;
        self
    }

    /// A rank that has work in hand and does not get on for so long has failed; a tenth of a second to a day, as for every
    /// time limit.
    pub fn progress_timeout(mut self, after: Duration) -> Self {
        self.run.stuck_after = limited(after);
        self.group.stuck_after = limited(after);
        self
    }

    /// A rank process that was not heard of for so long is lost.
    pub fn heartbeat_timeout(mut self, after: Duration) -> Self {
        self.group = self.group.with_silent_after(limited(after));
        self
    }

    /// How long rank processes may take to join.
    pub fn join_timeout(mut self, limit: Duration) -> Self {
        self.group.join_limit = limited(limit);
        self
    }

    /// What becomes of a load that loses a rank process.
    pub fn on_loss(mut self, what: OnLoss) -> Self {
        self.group.on_loss = what;
        self
    }

    /// How many lost rank processes may be replaced, all ranks together.
    pub fn max_restarts(mut self, restarts: u32) -> Self {
        self.group.max_restarts = restarts;
        self
    }

    /// How bytes pass between rank processes.
    pub fn transport(mut self, transport: Transport) -> Self {
        self.group.transport = transport;
        self
    }

    /// The directory where a server finds `config.json` and the tokenizer's files: the checkpoint's, or that of what was copied
    /// of it where its weights are elsewhere.
    ///
    /// `synth:FAMILY-SCHEME` is written to the cache directory (`$XDG_CACHE_HOME` or `~/.cache`) unless it is there.
    ///
    /// # Errors
    /// The source is none.
    pub fn directory(&self) -> Result<PathBuf, LoadError> {
        Ok(source::resolve(&self.source, None)?.metadata().to_owned())
    }

    /// What the load would do: who reads, passes on and holds how much. Reads headers only.
    ///
    /// # Errors
    /// The source is none, or cannot be loaded with these options.
    pub fn plan(&self) -> Result<Report, LoadError> {
        let plan = self.planned(self.tensor_parallel.unwrap_or(1))?;
        let mut report = Report::forecast(&plan, &self.source, RanksAs::Threads);
        report.device = self.run.device.name(report.identity.tp);
        Ok(report)
    }

    /// The checkpoint's tensors as they are stored, for servers that place weights themselves: `(name, view)` in the order in
    /// which they are complete, each view borrowed from memory that is used again once it is dropped.
    ///
    /// Reads whole tensors, whatever the group; [`TensorsOptions`] can choose among them.
    ///
    /// ```
    /// use longshore::Load;
    ///
    /// let mut tensors = Load::from("synth:llama-bf16").memory_limit(64 << 20).tensors()?;
    /// while let Some(tensor) = tensors.next()? {
    ///     println!("{} {:?}: {} bytes", tensor.name(), tensor.shape(), tensor.bytes().len());
    /// }
    /// # Ok::<(), longshore::LoadError>(())
    /// ```
    ///
    /// # Errors
    /// The source is none, or a tensor does not fit into the memory limit.
    pub fn tensors(&self) -> Result<Tensors, LoadError> {
        let options = TensorsOptions::default()
            .memory_limit(self.memory_limit)
            .io(self.run.io)
            .keep(self.keep.clone())
            .concurrency(self.run.concurrency);
        Tensors::open(&self.source, &options)
    }

    fn planned(&self, ranks: u32) -> Result<Plan, LoadError> {
        let discovered = discover(source::resolve(&self.source, self.keep.as_ref())?)?;
        let memory_limit = self.memory_limit.unwrap_or(self.plan.memory_limit);
        Plan::new(discovered, &PlanOptions { tp: ranks, memory_limit, ..self.plan })
    }
}

/// `limit`, where it can be counted with: no clock ticks every nanosecond, and none can tell the time at the end of time.
fn limited(limit: Duration) -> Duration {
    limit.clamp(*TIME_LIMITS.start(), *TIME_LIMITS.end())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No limit at all is asked for in this way; either end would be a panic.
    #[test]
    fn time_limits_are_such_as_can_be_kept() {
        for limit in [Duration::ZERO, Duration::MAX] {
            let load = Load::from("somewhere").progress_timeout(limit);
            let Load { group, run, .. } = load.heartbeat_timeout(limit).join_timeout(limit);
            for limit in [group.silent_after, group.stuck_after, group.join_limit, run.stuck_after]
            {
                assert!(TIME_LIMITS.contains(&limit), "{limit:?}");
            }
            assert!(!group.beat_every.is_zero());
        }
    }
}
