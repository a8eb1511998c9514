//! `longshore launch`: torchrun's flags, and what they mean for a launch.

use std::{ffi::OsString, fs, process::ExitCode, thread};

use clap::{Args, ValueEnum};

use super::arguments::OnLossArg;
use crate::{
    error::LoadError,
    launch::{Ended, Launch},
};

/// More processes than any host has devices or cores for.
const NPROC_MAX: u32 = 1024;

/// torchrun's flags; those with a dash are also understood with an underscore.
#[derive(Debug, Args)]
pub(super) struct LaunchArgs {
    /// Processes on this host: a number; cpu, as many as it has cores; gpu, as it has devices; or auto, gpu where there are any.
    #[arg(
        long,
        visible_alias = "nproc-per-node",
        alias = "nproc_per_node",
        value_name = "N",
        default_value = "1",
        value_parser = parse_nproc
    )]
    nproc: Nproc,
    /// Hosts.
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_nnodes)]
    nnodes: u32,
    /// This host among them; needed where there are several.
    #[arg(long, alias = "node_rank", value_name = "N")]
    node_rank: Option<u32>,
    /// The host of rank 0, and the first port to be tried there.
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST[:PORT]", value_parser = parse_endpoint)]
    rdzv_endpoint: Option<Endpoint>,
    /// static and c10d mean the same here.
    #[arg(long, alias = "rdzv_backend", value_enum, default_value_t = Backend::Static)]
    rdzv_backend: Backend,
    /// Taken as torchrun takes it, and of no meaning here.
    #[arg(long, alias = "rdzv_id", value_name = "ID")]
    rdzv_id: Option<String>,
    /// The host of rank 0, if --rdzv-endpoint does not say.
    #[arg(long, alias = "master_addr", value_name = "HOST")]
    master_addr: Option<String>,
    /// The first port to be tried there [default: a free one on one host, else 29500].
    #[arg(long, alias = "master_port", value_name = "PORT")]
    master_port: Option<u16>,
    /// How often ranks that failed are started again, all ranks together; all that fail within a second count once.
    #[arg(long, alias = "max_restarts", value_name = "N", default_value_t = 0)]
    max_restarts: u32,
    /// When a rank fails: wait, which starts it again as often as --max-restarts says; shrink, where the others go on without it
    /// (not without rank 0); or fail, which ends them all.
    #[arg(long, alias = "on_loss", value_enum, value_name = "WHAT", default_value_t = OnLossArg::Wait)]
    on_loss: OnLossArg,
    /// All ranks are on this host, whatever --rdzv-endpoint says.
    #[arg(long)]
    standalone: bool,
    /// As commands are always started here; taken so that torchrun's lines work.
    #[arg(long, alias = "no_python", hide = true)]
    no_python: bool,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nproc {
    Count(u32),
    Auto,
    Cpu,
    Gpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Static,
    C10d,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    host: String,
    port: Option<u16>,
}

/// Runs the command and says how to exit.
pub(super) fn run(arguments: &LaunchArgs) -> ExitCode {
    match arguments.launch().and_then(|launch| launch.run()) {
        Ok(ended) => exit(&ended),
        Err(e) => super::fail(&e.line(), e.exit_code()),
    }
}

/// Prints what is left to be said of a launch.
pub(super) fn exit(ended: &Ended) -> ExitCode {
    match &ended.line {
        Some(line) => super::fail(&crate::error::one_line(line), ended.code),
        None => ExitCode::from(ended.code),
    }
}

impl LaunchArgs {
    fn launch(&self) -> Result<Launch, LoadError> {
        let refuse =
            |option, reason: &str| Err(LoadError::Option { option, reason: reason.into() });
        if self.standalone && self.nnodes > 1 {
            return refuse(
                "--standalone",
                &format!("is for one host, --nnodes says {}", self.nnodes),
            );
        }
        let node_rank = match self.node_rank {
            None if self.nnodes > 1 => {
                return refuse("--node-rank", "expected this host's number: there are several");
            }
            given => given.unwrap_or(0),
        };
        let endpoint = self.rdzv_endpoint.as_ref().filter(|_| !self.standalone);
        let port = endpoint.and_then(|e| e.port).or(self.master_port).filter(|port| *port != 0);
        Ok(Launch {
            nnodes: self.nnodes,
            node_rank,
            master_addr: endpoint.map(|e| e.host.clone()).or(self.master_addr.clone()),
            master_port: port,
            max_restarts: match self.on_loss {
                OnLossArg::Wait => self.max_restarts,
                OnLossArg::Shrink | OnLossArg::Fail => 0,
            },
            shrinks: self.on_loss == OnLossArg::Shrink,
            ..Launch::new(self.command.clone(), self.nproc()?)
        })
    }

    fn nproc(&self) -> Result<u32, LoadError> {
        let cores = || thread::available_parallelism().map_or(1, |n| n.get() as u32);
        match self.nproc {
            Nproc::Count(count) => Ok(count),
            Nproc::Cpu => Ok(cores()),
            Nproc::Auto => Ok(Some(gpus()).filter(|count| *count > 0).unwrap_or_else(cores)),
            Nproc::Gpu => match gpus() {
                0 => Err(LoadError::Option {
                    option: "--nproc",
                    reason: "gpu: no device is found on this host".into(),
                }),
                count => Ok(count),
            },
        }
    }
}

fn parse_nproc(text: &str) -> Result<Nproc, String> {
    match text {
        "auto" => Ok(Nproc::Auto),
        "cpu" => Ok(Nproc::Cpu),
        "gpu" => Ok(Nproc::Gpu),
        text => match text.parse() {
            Ok(count @ 1..=NPROC_MAX) => Ok(Nproc::Count(count)),
            _ => Err(format!("expected 1 to {NPROC_MAX}, auto, cpu or gpu")),
        },
    }
}

/// `2`, or torchrun's `2:2`.
fn parse_nnodes(text: &str) -> Result<u32, String> {
    let number = |text: &str| text.parse().ok().filter(|count| *count > 0);
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    match (number(least), number(most)) {
        (Some(least), Some(most)) if least == most => Ok(least),
        (Some(_), Some(_)) => {
            Err("the number of hosts does not change: both numbers must be the same".into())
        }
        _ => Err("expected the number of hosts".into()),
    }
}

/// `host`, `host:29500`, `[::1]:29500`. An address with colons of its own has brackets.
fn parse_endpoint(text: &str) -> Result<Endpoint, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    if host.is_empty() {
        return Err("expected HOST or HOST:PORT".into());
    }
    let port = port.map(str::parse).transpose();
    let port = port.map_err(|_| "expected a port from 0 to 65535 after the colon".to_owned())?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    Ok(Endpoint { host: bare.unwrap_or(host).to_owned(), port })
}

/// NVIDIA devices that the ranks may see.
fn gpus() -> u32 {
    let names = fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    count_gpus(names, std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
}

/// Device files are `nvidia0`, `nvidia1`, … **Source:** NVIDIA's driver README, "Device files".
fn count_gpus(names: impl Iterator<Item = String>, visible: Option<&str>) -> u32 {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let present = names.filter(|name| name.strip_prefix("nvidia").is_some_and(is_number)).count();
    // devices after the first that cannot be are hidden. **Source:** CUDA programming guide, "Environment variables"
    let listed = visible.map(|list| {
        let names = list.split(',').map(str::trim);
        names.take_while(|name| !name.is_empty() && !name.starts_with('-')).count()
    });
    present.min(listed.unwrap_or(present)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_a_host_and_perhaps_a_port() {
        let parse = |text| parse_endpoint(text).map(|e| (e.host, e.port));
        assert_eq!(parse("node-0"), Ok(("node-0".into(), None)));
        assert_eq!(parse("node-0:29500"), Ok(("node-0".into(), Some(29500))));
        assert_eq!(parse("[::1]:1"), Ok(("::1".into(), Some(1))));
        assert_eq!(parse("fe80::1"), Ok(("fe80::1".into(), None)));
        assert!(parse("node-0:x").is_err() && parse(":1").is_err() && parse("").is_err());
        assert!(parse("node-0:65536").is_err());
    }

    #[test]
    fn hosts_are_a_number_or_the_same_twice() {
        assert_eq!((parse_nnodes("2"), parse_nnodes("3:3")), (Ok(2), Ok(3)));
        assert!(parse_nnodes("1:2").unwrap_err().contains("same"));
        for text in ["0", "", "a", "1:", "1:2:3", "-1"] {
            assert!(parse_nnodes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_counted_as_far_as_they_are_visible() {
        let count = |visible| {
            let names =
                ["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia", "sda"];
            count_gpus(names.into_iter().map(str::to_owned), visible)
        };
        assert_eq!((count(None), count(Some("1")), count(Some("0, 1,10,11"))), (3, 1, 3));
        assert_eq!((count(Some("")), count(Some("0,-1,1")), count(Some("GPU-a,GPU-b"))), (0, 1, 2));
    }
}
