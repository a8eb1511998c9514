//! Bytes per second of the kernels on a device and of the ways to it, beside the device's own copies.
//!
//! ```text
//! cargo bench -p longshore-kernels --bench device -- [OPTIONS] [PATTERN]     rows whose name or shape contains PATTERN
//!
//! --mib N            matrices of N MiB in all (default 1024: well past any device's L2)
//! --tiny             shapes and sizes that an emulated driver gets through; says nothing about rates
//! --samples N        how often a row is timed (default 9)
//! --describe         only what device there is; exit code 3 where there is none
//! --threads N        threads that read (default: twice the cores, at most 16)
//! --read FILE...     only the rate at which threads read these files from the page cache into pinned memory; comes last
//! ```
//!
//! Each row runs once, and what it made is compared with the host twin, all of it; then it takes turns with a copy of as
//! many bytes on the same memory, timed by the device's events once both are warm, and the median of each counts. On the device,
//! bytes are those read plus those written, of kernel and copy alike; on the way to it, each byte counts once.
//!
//! `wanted` is the least ratio that a row is to reach; rows without are for information. `scripts/gpu_check.sh` runs this
//! and judges.

#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

mod arenas;
mod kernels;
mod transfers;
#[path = "../../tests/twins/mod.rs"]
#[allow(
    dead_code,
    clippy::panic,
    reason = "the tests', who use all of it; nothing here fails by it"
)]
mod twins;

use std::{env, error::Error, path::PathBuf, process::ExitCode, thread, time::Duration};

use longshore_kernels::cuda::driver::{Device, probe};

use arenas::Arenas;

fn main() -> ExitCode {
    let settings = match Settings::of(env::args().skip(1)) {
        Ok(settings) => settings,
        Err(why) => {
            eprintln!("device: {why}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = probe() {
        // an ordinary answer, which a script may ask for
        eprintln!("no CUDA device: {error}");
        return ExitCode::from(if settings.describe { 3 } else { 0 });
    }
    match run(&settings) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("device: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is asked for.
struct Settings {
    bytes: usize,
    tiny: bool,
    samples: usize,
    threads: usize,
    describe: bool,
    read: Vec<PathBuf>,
    pattern: String,
}

impl Settings {
    fn of(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        let (mut bytes, mut tiny, mut describe) = (1 << 30, false, false);
        let (mut samples, mut threads) = (9, (2 * cores).min(16));
        let (mut read, mut pattern) = (Vec::new(), String::new());
        while let Some(arg) = args.next() {
            let mut number = || {
                let value = args.next().and_then(|text| text.parse().ok()).filter(|n| *n > 0);
                value.ok_or_else(|| format!("{arg} takes a number"))
            };
            match arg.as_str() {
                "--mib" => bytes = number()? << 20,
                "--samples" => samples = number()?,
                "--threads" => threads = number()?,
                "--tiny" => tiny = true,
                "--describe" => describe = true,
                "--read" => read = args.by_ref().map(PathBuf::from).collect(),
                // what cargo adds
                "--bench" => {}
                _ if arg.starts_with('-') => return Err(format!("no option {arg}")),
                _ => pattern = arg,
            }
        }
        if tiny {
            bytes = 4 << 20;
        }
        Ok(Self { bytes, tiny, samples, threads, describe, read, pattern })
    }
}

/// Returns whether all that was compared is equal.
fn run(settings: &Settings) -> Result<bool, Box<dyn Error>> {
    let device = Device::open(0)?;
    if settings.describe {
        let (memory, driver) = (device.memory()?, probe()?);
        let gib = memory.total as f64 / f64::from(1 << 30);
        let multiprocessors = device.geometry().multiprocessors;
        println!("{}, {multiprocessors} multiprocessors, {gib:.0} GiB", device.name());
        println!("CUDA {}.{}", driver.version / 1000, driver.version % 1000 / 10);
        return Ok(true);
    }
    let mut table = Table::new(settings);
    if !settings.read.is_empty() {
        transfers::read(&mut table, &device, settings)?;
        return Ok(true);
    }
    device.load_all()?;
    let mut arenas = Arenas::new(&device, settings.bytes)?;
    kernels::measure(&mut table, &mut arenas, settings.tiny)?;
    transfers::to_device(&mut table, &mut arenas, settings.tiny)?;
    Ok(table.equal)
}

/// After a comparison on the host the device's clocks have fallen; this brings them back.
const WARM_UP: Duration = Duration::from_millis(100);

/// The rows so far: printed as they come.
struct Table {
    pattern: String,
    samples: usize,
    /// How long a row runs before it is timed.
    warm_up: Duration,
    equal: bool,
}

/// What a row is called, and what is asked of it.
struct Row {
    name: String,
    shape: String,
    wanted: Option<f64>,
}

impl Row {
    fn new(name: impl Into<String>, shape: impl Into<String>, wanted: Option<f64>) -> Self {
        Self { name: name.into(), shape: shape.into(), wanted }
    }
}

impl Table {
    fn new(settings: &Settings) -> Self {
        println!("| what | shape | GB/s | limit, GB/s | ratio | wanted | bytes |");
        println!("|---|---|---|---|---|---|---|");
        let warm_up = if settings.tiny { Duration::ZERO } else { WARM_UP };
        let (pattern, samples) = (settings.pattern.clone(), settings.samples);
        Self { pattern, samples, warm_up, equal: true }
    }

    fn wants(&self, row: &Row) -> bool {
        format!("{} {}", row.name, row.shape).contains(&self.pattern)
    }

    /// A rate, in bytes per second, beside its limit; `equal` says whether what was made is what the host makes.
    fn print(&mut self, row: &Row, rate: f64, limit: Option<f64>, equal: Option<bool>) {
        let none = || "–".to_owned();
        let [limit_text, ratio] = match limit {
            Some(limit) => [format!("{:.1}", limit / 1e9), format!("{:.2}", rate / limit)],
            None => [none(), none()],
        };
        let wanted = row.wanted.map_or_else(none, |wanted| format!("{wanted:.2}"));
        let bytes = match equal {
            Some(true) => "equal",
            Some(false) => "DIFFERENT",
            None => "–",
        };
        self.equal &= equal != Some(false);
        let Row { name, shape, .. } = row;
        let rate = rate / 1e9;
        println!("| {name} | {shape} | {rate:.1} | {limit_text} | {ratio} | {wanted} | {bytes} |");
    }
}

/// The one in the middle.
fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}
