//! Flags and arguments, and what they mean for a plan and a load.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use longshore_models::options::{KernelLayout, ModelOptions, Quantization};
use longshore_rank::storage::IoChoice;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cache::weights::KeepWeights,
    device::DeviceChoice,
    error::LoadError,
    load::RunOptions,
    plan::{Exchange, MEMORY_LIMIT, PlanOptions},
    processes::{GroupOptions, MAX_RESTARTS, OnLoss, TIME_LIMITS, Transport},
    synth::{Scale, Synth},
};

use super::{chaos::ChaosArgs, launch::LaunchArgs};

/// Loads a large language model's checkpoint onto the ranks of a tensor-parallel server.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(super) struct Cli {
    /// Print one JSON document on stdout and nothing else there.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// What to log on stderr: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL")]
    pub(super) log_level: LevelFilter,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Load a checkpoint onto N ranks until every one is complete.
    Load(LoadArgs),
    /// Show who would read, exchange and hold what; reads headers only. Takes the options of load.
    Plan(LoadArgs),
    /// Show what a checkpoint holds.
    Inspect(InspectArgs),
    /// Write a synthetic checkpoint.
    Synth(SynthArgs),
    /// Be one rank of a group of processes; finds its place in the environment of torchrun, srun or longshore launch. Takes the
    /// options of load.
    Rank(RankArgs),
    /// List what a cache directory holds of models whose weights are elsewhere, or remove it.
    Cache(CacheArgs),
    /// Start a command as every rank of this host, and as one that fails again; takes torchrun's flags.
    Launch(LaunchArgs),
    /// Kill, stop and delay ranks while they load, and compare what comes of it with an undisturbed run. Takes the options of
    /// load, or after -- a launch command of your own whose ranks embed longshore.
    Chaos(ChaosArgs),
}

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// A checkpoint directory, or synth:FAMILY-SCHEME.
    pub(super) source: String,
    /// Expert-parallel size; divides --tp.
    #[arg(long, value_name = "N", default_value_t = 1)]
    ep: u32,
    /// Which kernels to finish the parameters for: none, cutlass, flashinfer-cutlass, trtllm or aiter.
    #[arg(long, value_name = "LAYOUT")]
    kernel_layout: Option<KernelLayout>,
    /// What quantised modules are stored in, whatever the checkpoint's files declare: fp8; nvfp4 (or modelopt,
    /// modelopt_fp4); mxfp4 (or quark); int4 (or compressed-tensors); bf16. Decides between files that contradict each other;
    /// nothing is quantised by it, and tensors that say otherwise are an error.
    #[arg(long, value_name = "METHOD")]
    quantization: Option<Quantization>,
    /// Make the shared expert the last routed expert.
    #[arg(long)]
    fuse_shared_experts: bool,
    /// Load the prediction layer as the draft model, and nothing else.
    #[arg(long)]
    draft: bool,
    /// Skip the vision tower.
    #[arg(long, conflicts_with = "encoder_only")]
    language_only: bool,
    /// Load only the vision tower.
    #[arg(long)]
    encoder_only: bool,
    /// Copy what is not on this host to the cache directory first, and read it from there.
    #[arg(long)]
    pub(super) download: bool,
    /// Keep what is read of weights that are not on this host in this directory, and read from there what is kept. Processes
    /// and models may share it. Of a source on this host nothing is kept.
    #[arg(long, value_name = "DIR", conflicts_with = "download")]
    cache_dir: Option<PathBuf>,
    /// The most that --cache-dir may take, for all models together: what was not used for longest goes first, and what does not
    /// fit is not kept [default: what its file system has].
    #[arg(long, value_name = "BYTES", requires = "cache_dir", value_parser = parse_bytes)]
    cache_limit: Option<u64>,
    /// Skip tensors that belong to no parameter, with a warning.
    #[arg(long)]
    allow_unknown: bool,
    /// Whether ranks pass bytes to each other, so that each is read once.
    #[arg(long, value_enum, default_value_t = ExchangeArg::Auto)]
    exchange: ExchangeArg,
    /// Staging memory that a rank may hold beside its parameters [default: RUNAI_STREAMER_MEMORY_LIMIT, else 512MiB].
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory_limit: Option<u64>,
    /// The longest read [default: 2MiB, less where --memory-limit wants it].
    #[arg(long, value_name = "BYTES", value_parser = parse_read_size)]
    read_size: Option<u64>,
    /// Ranks as actors of this process, or a process each.
    #[arg(long, value_enum, default_value_t = RanksArg::Threads)]
    pub(super) ranks: RanksArg,
    /// Where parameters live: cpu, or cuda, where a rank's device is that of its number on the host [default: cuda where there
    /// is a device for each rank of the host, else cpu].
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DeviceChoice>,
}

#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// Tensor-parallel size.
    #[arg(long, value_name = "N")]
    pub(super) tp: u32,
    #[command(flatten)]
    pub(super) run: RunArgs,
}

#[derive(Debug, Args)]
pub(super) struct RankArgs {
    /// Tensor-parallel size; must be the number of processes, which it is by default.
    #[arg(long, value_name = "N")]
    tp: Option<u32>,
    #[command(flatten)]
    pub(super) run: RunArgs,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) plan: PlanArgs,
    /// Write each rank's finished parameters to this directory.
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Then load this checkpoint into the same parameters, in place; files that are the same are not read again (repeatable).
    #[arg(long, value_name = "SOURCE")]
    pub(super) reload: Vec<String>,
    /// Reads in flight per rank [default: RUNAI_STREAMER_CONCURRENCY, else what storage and cores suggest].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Option<u16>,
    /// Read through the page cache, past it, or as each file's state suggests.
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    io: IoArg,
    /// First verify every weight file against what its source publishes: SHA-256 of the hub or S3, SHA256SUMS or NAME.sha256
    /// beside the files. Reads each file once more.
    #[arg(long)]
    verify: bool,
    /// Do not hash the parameters afterwards.
    #[arg(long)]
    pub(super) no_digest: bool,
    /// A rank that has work in hand and does not get on for so long has failed.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_seconds)]
    progress_timeout: Duration,
    /// A rank process that was not heard of for so long is lost.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    heartbeat_timeout: Duration,
    /// How long rank processes may take to join.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = parse_seconds)]
    join_timeout: Duration,
    /// How bytes pass between rank processes: NCCL where each has a device of its own, else as host; host: shared memory where
    /// they are on one host and TCP elsewhere; TCP; NCCL.
    #[arg(long, value_enum, default_value_t = TransportArg::Auto)]
    transport: TransportArg,
    /// When a rank process is lost: wait for the one that is started in its place; shrink the group to the ranks that are left (not
    /// without rank 0), with the largest --tp that the model can be split over; or fail at once.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnLossArg::Wait)]
    on_loss: OnLossArg,
    /// How many lost rank processes are replaced, all ranks together.
    #[arg(long, value_name = "N", default_value_t = MAX_RESTARTS)]
    max_restarts: u32,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A checkpoint directory, or synth:FAMILY-SCHEME.
    pub(super) source: String,
    /// What quantised modules are stored in, as for load.
    #[arg(long, value_name = "METHOD")]
    quantization: Option<Quantization>,
    /// List which runtime parameter each tensor becomes part of.
    #[arg(long)]
    pub(super) map: bool,
    /// Expert-parallel size that --map counts a rank's experts for.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "map")]
    pub(super) ep: u32,
    /// Make the shared expert the last routed expert.
    #[arg(long)]
    fuse_shared_experts: bool,
    /// Inspect for the prediction layer as the draft model.
    #[arg(long)]
    draft: bool,
}

#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// What load keeps in this directory, rather than what it always copies of a model.
    #[arg(long, value_name = "DIR", global = true)]
    pub(super) cache_dir: Option<PathBuf>,
    /// What to do [default: list].
    #[command(subcommand)]
    pub(super) action: Option<CacheAction>,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(super) enum CacheAction {
    /// List what is there, the last used first.
    List,
    /// Remove what was not used for a while.
    Prune {
        /// For so many days.
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        unused_for: u32,
    },
}

#[derive(Debug, Args)]
pub(super) struct SynthArgs {
    /// The directory to write; created if need be.
    pub(super) dir: PathBuf,
    /// Model family: llama, qwen3, qwen3_moe, deepseek_v3, deepseek_v32, glm_moe_dsa or kimi_k25.
    #[arg(long, value_name = "FAMILY", requires = "quant", required_unless_present = "config")]
    model: Option<String>,
    /// Quantisation scheme: bf16; fp8 for deepseek_v3, deepseek_v32 and glm_moe_dsa; nvfp4 for deepseek_v3, glm_moe_dsa and
    /// kimi_k25; mxfp4 for glm_moe_dsa and kimi_k25; int4 for kimi_k25.
    #[arg(long, value_name = "SCHEME", requires = "model")]
    quant: Option<String>,
    /// Take dimensions and quantisation from the config.json (and hf_quant_config.json) in this directory.
    #[arg(long, value_name = "CONFIG_DIR", conflicts_with_all = ["model", "quant"])]
    config: Option<PathBuf>,
    /// How large: tiny, small or full [default: tiny, with --config full].
    #[arg(long)]
    scale: Option<Scale>,
    /// Another number of layers than the scale's.
    #[arg(long, value_name = "N")]
    layers: Option<u32>,
    /// Write real headers over holes: full length, no space taken.
    #[arg(long)]
    headers_only: bool,
    /// Seed of the random weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExchangeArg {
    Auto,
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TransportArg {
    Auto,
    Host,
    Tcp,
    Nccl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OnLossArg {
    Wait,
    Shrink,
    Fail,
}

impl From<OnLossArg> for OnLoss {
    fn from(given: OnLossArg) -> Self {
        match given {
            OnLossArg::Wait => OnLoss::Wait,
            OnLossArg::Shrink => OnLoss::Shrink,
            OnLossArg::Fail => OnLoss::Fail,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RanksArg {
    Threads,
    Processes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum IoArg {
    Auto,
    Buffered,
    Direct,
}

impl PlanArgs {
    /// Where parameters are to live.
    pub(super) fn device_choice(&self) -> DeviceChoice {
        self.device.unwrap_or(DeviceChoice::Auto)
    }

    /// Where what is read of weights elsewhere is to be kept.
    pub(super) fn keep(&self) -> Option<KeepWeights> {
        let dir = self.cache_dir.clone()?;
        Some(KeepWeights { dir, limit_bytes: self.cache_limit })
    }

    /// # Errors
    /// An environment variable that cannot be understood.
    pub(super) fn plan_options(&self, tp: u32) -> Result<PlanOptions, LoadError> {
        Ok(PlanOptions {
            tp,
            ep: self.ep,
            model: ModelOptions {
                kernel_layout: self.kernel_layout,
                quantization: self.quantization,
                fuse_shared_experts: self.fuse_shared_experts,
                draft: self.draft,
                language_only: self.language_only,
                encoder_only: self.encoder_only,
                allow_unknown: self.allow_unknown,
            },
            exchange: match self.exchange {
                ExchangeArg::Auto => Exchange::Auto,
                ExchangeArg::On => Exchange::On,
                ExchangeArg::Off => Exchange::Off,
            },
            memory_limit: match self.memory_limit {
                Some(bytes) => bytes,
                None => from_environment("RUNAI_STREAMER_MEMORY_LIMIT", |text| match text {
                    // Run:ai's "no limit" and "as little as works": no limit of the user's own
                    "-1" | "0" => Ok(MEMORY_LIMIT),
                    text => parse_bytes(text),
                })?
                .unwrap_or(MEMORY_LIMIT),
            },
            read_bytes: self.read_size,
        })
    }
}

impl InspectArgs {
    pub(super) fn model_options(&self) -> ModelOptions {
        ModelOptions {
            // nothing is derived, so nothing is refused that only some kernels could not take
            kernel_layout: Some(KernelLayout::None),
            quantization: self.quantization,
            fuse_shared_experts: self.fuse_shared_experts,
            draft: self.draft,
            ..ModelOptions::default()
        }
    }
}

impl RankArgs {
    /// The tensor-parallel size of a group of `world_size` processes.
    ///
    /// # Errors
    /// Another one was given.
    pub(super) fn tp(&self, world_size: u32) -> Result<u32, LoadError> {
        match self.tp {
            Some(tp) if tp != world_size => {
                let reason = format!("{tp}, but the group has {world_size} processes");
                Err(LoadError::Option { option: "--tp", reason })
            }
            _ => Ok(world_size),
        }
    }
}

impl RunArgs {
    /// How a group of processes is held together.
    ///
    /// # Errors
    /// It is to shrink, which it cannot yet.
    pub(super) fn group_options(&self) -> Result<GroupOptions, LoadError> {
        Ok(GroupOptions {
            transport: match self.transport {
                TransportArg::Auto => Transport::Auto,
                TransportArg::Host => Transport::Host,
                TransportArg::Tcp => Transport::Tcp,
                TransportArg::Nccl => Transport::Nccl,
            },
            stuck_after: self.progress_timeout,
            join_limit: self.join_timeout,
            on_loss: self.on_loss.into(),
            max_restarts: self.max_restarts,
            ..GroupOptions::default()
        }
        .with_silent_after(self.heartbeat_timeout))
    }

    /// # Errors
    /// An environment variable that cannot be understood.
    pub(super) fn run_options(&self) -> Result<RunOptions, LoadError> {
        Ok(RunOptions {
            io: match self.io {
                IoArg::Auto => IoChoice::Auto,
                IoArg::Buffered => IoChoice::Buffered,
                IoArg::Direct => IoChoice::Direct,
            },
            stuck_after: self.progress_timeout,
            device: self.plan.device_choice(),
            verify: self.verify,
            concurrency: match self.concurrency {
                Some(count) => Some(usize::from(count)),
                None => from_environment("RUNAI_STREAMER_CONCURRENCY", |text| {
                    let count = text.parse().ok().filter(|count| (1..=256).contains(count));
                    count.ok_or_else(|| "a number from 1 to 256".to_owned())
                })?,
            },
        })
    }
}

impl SynthArgs {
    pub(super) fn synth(&self) -> Synth {
        let start = match (&self.config, &self.model, &self.quant) {
            (Some(config), ..) => Synth::like(config),
            (None, model, quant) => {
                let text = |given: &Option<String>| given.clone().unwrap_or_default();
                Synth::new(&text(model), &text(quant))
            }
        };
        start.scale(self.scale).layers(self.layers).headers_only(self.headers_only).seed(self.seed)
    }
}

/// What an environment variable says, if it is set; flags win over it (contract §1).
fn from_environment<T>(
    variable: &'static str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, LoadError> {
    let Some(text) = std::env::var_os(variable).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let text = text.to_string_lossy();
    parse(text.trim()).map(Some).map_err(|expected| LoadError::Option {
        option: variable,
        reason: format!("expected {expected}, found {text}"),
    })
}

/// `1048576`, `512MiB`, `4 GiB`, `2GB`.
fn parse_bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 8] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
    ];
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, size)| Some((text.strip_suffix(name)?, *size)))
        .unwrap_or((text, 1));
    let number: u64 =
        number.trim().parse().map_err(|_| "a number of bytes, for example 512MiB".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "too large".to_owned())
}

/// `cpu`, `cuda`, or `cuda:N`, which means the same (contract §1).
fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text.strip_prefix("cuda:").map(str::parse::<u32>) {
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        None if text == "cuda" => Ok(DeviceChoice::Cuda),
        Some(Ok(_)) => Ok(DeviceChoice::Cuda),
        _ => Err("neither cpu nor cuda".to_owned()),
    }
}

/// Seconds, with a fraction perhaps.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|limit| TIME_LIMITS.contains(limit))
        .ok_or_else(|| "expected a number of seconds from 0.1 to 86400".to_owned())
}

fn parse_read_size(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        bytes if (64 << 10..=1 << 30).contains(&bytes) => Ok(bytes),
        _ => Err("64KiB to 1GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    fn group_options(arguments: &[&str]) -> Result<GroupOptions, LoadError> {
        let line = [&["longshore", "rank", "checkpoint"], arguments].concat();
        match Cli::try_parse_from(line).unwrap().command {
            Command::Rank(rank) => rank.run.group_options(),
            other => unreachable!("{other:?}"),
        }
    }

    #[test]
    fn a_lost_rank_is_waited_for_unless_told_otherwise() {
        let group = group_options(&[]).unwrap();
        assert_eq!((group.on_loss, group.max_restarts), (OnLoss::Wait, 3));
        let group = group_options(&["--on-loss", "fail", "--max-restarts", "0"]).unwrap();
        assert_eq!((group.on_loss, group.max_restarts), (OnLoss::Fail, 0));
        assert_eq!(group_options(&["--on-loss=shrink"]).unwrap().on_loss, OnLoss::Shrink);
    }

    #[test]
    fn byte_counts_take_units() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("2 GB"), Ok(2_000_000_000));
        assert_eq!(parse_bytes("17"), Ok(17));
        assert!(parse_bytes("1.5GiB").is_err() && parse_bytes("").is_err());
        assert!(parse_bytes("99999999999TiB").is_err());
    }
}
