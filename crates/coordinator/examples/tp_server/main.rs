//! A small tensor-parallel server, to be read by whoever embeds longshore into a larger one: one process per rank, each
//! holds its part of a Llama, together they continue token sequences.
//!
//! ```sh
//! cargo build --bin longshore --example tp_server
//! target/debug/longshore launch --nproc 2 -- target/debug/examples/tp_server synth:llama-bf16 --check
//! target/debug/longshore launch --nproc 2 -- target/debug/examples/tp_server synth:llama-bf16 --listen 127.0.0.1:8000
//! torchrun --nproc-per-node 2 --no-python target/debug/examples/tp_server synth:llama-bf16 --listen 127.0.0.1:8000
//! ```
//!
//! A client sends lines of JSON, and is answered in lines:
//!
//! ```sh
//! $ nc 127.0.0.1 8000
//! {"tokens": [1, 2, 3], "steps": 4}
//! {"logits_max":0.004499146714806557,"tokens":[104,52,25,323]}
//! {"quit": true}
//! ```
//!
//! | file | what it shows |
//! |---|---|
//! | `main.rs` | a rank's life: place, plan, load, meet the others, serve |
//! | `ranks.rs` | how ranks find each other once they are loaded; collectives over sockets, where a real server has NCCL |
//! | `serve.rs` | rank 0 takes requests and tells the others; what happens when one of them dies |
//! | `model.rs`, `math.rs` | the forward pass on one rank's parameters |
//!
//! Any Llama in BF16 will do, if slowly: there is no key/value cache, and the arithmetic is plain loops. SIGTERM ends a rank
//! as it ends any process, and the others with it, because they lose their connection.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that tells what it does")]

mod math;
mod model;
mod ranks;
mod serve;

use std::{error::Error, fs, io, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::Parser;
use longshore::{Dtype, Load, LoadError, Place, Report};

use self::{
    model::{Dims, Group, Model, ModelError},
    ranks::{Alone, Ranks},
    serve::{Word, follow, generate, lead},
};

/// A tensor-parallel server of a small Llama, started once per rank by longshore launch, torchrun or srun.
#[derive(Debug, Parser)]
struct Arguments {
    /// A checkpoint directory, or synth:llama-bf16.
    source: String,
    /// Compares what the ranks compute together with what one computes alone, and ends.
    #[arg(long)]
    check: bool,
    /// Where rank 0 takes requests. Whoever can connect is served.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let place = match Place::from_env() {
        Ok(place) => place,
        Err(e) => return Failure::from(e).tell(0),
    };
    let rank = place.rank;
    match run(&arguments, place) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => e.tell(rank),
    }
}

/// One rank's life.
fn run(arguments: &Arguments, place: Place) -> Result<(), Failure> {
    let first = place.rank == 0;
    let load = Load::from(&arguments.source);
    let dims = dims(&load)?;

    // every rank plans for itself, from headers alone, and comes to the same plan
    let joining = load.clone().join(place)?;
    if first {
        println!("{}", brief(&joining.plan()));
    }
    let mut rank = joining.wait()?;
    if let Some(seconds) = rank.report().and_then(|report| report.seconds) {
        println!("loaded in {seconds:.2} s");
    }

    // while the ranks are still a group they tell each other where they are
    let mut ranks = Ranks::meet(&mut rank)?;
    // from here on they have connections of their own; the parameters stay at their addresses
    let own = rank.leave()?;
    let params = Finished::of(own.params())?;

    let model = Model::new(dims, ranks.size());
    match (first, arguments.check) {
        (true, true) => check(load, dims, &model, &params, &mut ranks),
        (true, false) => lead(arguments.listen, &model, &params, &mut ranks),
        (false, _) => follow(&model, &params, &mut ranks),
    }
}

/// The model's dimensions, or why it is not one that is computed here; before anything of it is loaded.
fn dims(load: &Load) -> Result<Dims, Failure> {
    let path = load.directory()?.join("config.json");
    let config = fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
    let config = config.map_err(|source| Failure::Config { path, source })?;
    Ok(Dims::from_config(&config)?)
}

fn brief(plan: &Report) -> String {
    let mib = |bytes| bytes as f64 / f64::from(1 << 20);
    let (read, passed) = (mib(plan.storage_bytes_read), mib(plan.exchanged_bytes));
    let held: u64 = plan.ranks.iter().map(|rank| rank.parameter_bytes).sum();
    format!(
        "{} {} on {} ranks: {read:.2} MiB read, {passed:.2} MiB passed on, {:.2} MiB held",
        plan.identity.family,
        plan.identity.quant,
        plan.identity.tp,
        mib(held)
    )
}

/// A rank's parameters, as the model asks for them.
struct Finished<'a>(longshore::Params<'a>);

impl<'a> Finished<'a> {
    fn of(params: longshore::Params<'a>) -> Result<Self, Failure> {
        match params.iter().find(|param| param.dtype != Dtype::BF16) {
            None => Ok(Self(params)),
            Some(param) => Err(Failure::Dtype { param: param.name.to_owned(), found: param.dtype }),
        }
    }
}

impl model::Params for Finished<'_> {
    fn param(&self, name: &str) -> Option<(&[u64], &[u8])> {
        self.0.get(name).and_then(|param| Some((param.shape, param.data.host()?)))
    }
}

/// Two sums of the same numbers in different order differ by less.
const DIFFERENCE_MAX: f32 = 1e-3;

/// Rank 0 loads the whole model as well, and compares the logits of all ranks together with its own.
fn check(
    load: Load,
    dims: Dims,
    model: &Model,
    params: &Finished<'_>,
    ranks: &mut Ranks,
) -> Result<(), Failure> {
    let loaded = load.start()?.wait()?;
    let whole = Finished::of(loaded.ranks()?[0])?;
    let whole_model = Model::new(dims, 1);
    let mut largest = 0.0f32;
    for (length, stride) in [(1, 1), (7, 41), (24, 97)] {
        let tokens: Vec<u32> = (1..=length).map(|i| i * stride % dims.vocab as u32).collect();
        ranks.tell(&Word::Generate { tokens: tokens.clone(), steps: 1 })?;
        let together = generate(model, params, ranks, &tokens, 1)?.logits;
        let alone = generate(&whole_model, &whole, &mut Alone, &tokens, 1)?.logits;
        let apart = difference(&together, &alone);
        println!("{length} tokens: logits differ by {apart:.1e} of the largest");
        // what is not a number is as bad as it gets
        largest = if apart.is_nan() { f32::INFINITY } else { largest.max(apart) };
    }
    ranks.tell(&Word::End)?;
    println!("largest difference {largest:.1e}, {DIFFERENCE_MAX:.0e} is allowed");
    match largest <= DIFFERENCE_MAX {
        true => Ok(()),
        false => Err(Failure::Differs),
    }
}

/// The largest difference, relative to the largest logit.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m }) / largest
}

/// Why a rank ends before it was told to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{}", .path.display())]
    Config { path: PathBuf, source: io::Error },
    #[error("parameter {param} is {found:?}, BF16 is computed here")]
    Dtype { param: String, found: Dtype },
    /// Names the rank that was lost.
    #[error(transparent)]
    Ranks(#[from] io::Error),
    #[error("{address}: no requests can be taken there")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the ranks together compute something else than one alone")]
    Differs,
}

impl Failure {
    /// One line, unless rank 0 says the same.
    fn tell(&self, rank: u32) -> ExitCode {
        if rank == 0 || !self.is_told_by_rank_0() {
            let mut line = self.to_string();
            let mut cause = self.source();
            while let Some(e) = cause {
                line.push_str(&format!(": {e}"));
                cause = e.source();
            }
            // in one piece, so that no other rank writes into it
            let line = format!("tp_server: {line}\n");
            eprint!("{line}");
        }
        match self {
            Self::Load(e) => e.exit_code().into(),
            Self::Model(ModelError::Config { .. }) | Self::Config { .. } => 2.into(),
            _ => ExitCode::FAILURE,
        }
    }

    /// Whether it is the same on every rank, or was learned from rank 0.
    fn is_told_by_rank_0(&self) -> bool {
        match self {
            Self::Load(e) => matches!(e, LoadError::GroupEnded { .. }),
            Self::Model(e) => !matches!(e, ModelError::Group(_)),
            Self::Config { .. } | Self::Dtype { .. } => true,
            _ => false,
        }
    }
}
