//! Reads all objects under a location, over and over for some seconds, and tells bytes per second and what it took.
//!
//! ```text
//! throughput LOCATION [--threads N] [--seconds N] [--read-mib N] [--concurrency N] [--part-mib N] [--no-hedge]
//! ```
#![expect(clippy::print_stdout, reason = "the result")]

use std::{
    env,
    error::Error,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use longshore_store::{Location, Store, StoreError, StoreOptions};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |name: &str| -> Result<Option<u64>, Box<dyn Error>> {
        let Some(at) = arguments.iter().position(|argument| argument == name) else {
            return Ok(None);
        };
        Ok(Some(arguments.get(at + 1).ok_or("a number is missing")?.parse()?))
    };
    let text = arguments.first().ok_or("throughput LOCATION …")?;
    let location = Location::parse(text)?.ok_or("not remote")?;
    let threads = number("--threads")?.unwrap_or(4);
    let duration = Duration::from_secs(number("--seconds")?.unwrap_or(10));
    let read_bytes = number("--read-mib")?.unwrap_or(32) << 20;
    let mut options = StoreOptions {
        hedge: !arguments.iter().any(|argument| argument == "--no-hedge"),
        ..StoreOptions::default()
    };
    options.concurrency = number("--concurrency")?.map(|n| n as usize);
    options.part_bytes = number("--part-mib")?.map_or(options.part_bytes, |mib| mib << 20);

    let start = Instant::now();
    let store = Store::open(&location, &options)?;
    let opened = start.elapsed();
    let objects: Vec<_> = store.list()?.iter().map(|info| store.object(info)).collect();
    println!(
        "opened in {opened:?}, listed {} objects in {:?}",
        objects.len(),
        start.elapsed() - opened
    );
    let pieces: Vec<_> = objects
        .iter()
        .flat_map(|object| {
            let bytes = object.info().bytes;
            (0..bytes.div_ceil(read_bytes))
                .map(move |n| (object, n * read_bytes..bytes.min((n + 1) * read_bytes)))
        })
        .collect();
    let (next, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let cpu = cpu_seconds();
    let start = Instant::now();
    thread::scope(|scope| -> Result<(), StoreError> {
        let readers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut target = vec![0; read_bytes as usize];
                    while start.elapsed() < duration {
                        let (object, range) =
                            &pieces[next.fetch_add(1, Relaxed) as usize % pieces.len()];
                        let bytes = range.end - range.start;
                        object.read(range.clone(), &mut target[..bytes as usize])?;
                        total.fetch_add(bytes, Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or(Ok(())))
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let gigabytes = total.load(Relaxed) as f64 / 1e9;
    let cpu = cpu_seconds() - cpu;
    println!(
        "{:.2} GB/s, {:.2} CPU s/GB, {:?}",
        gigabytes / seconds,
        cpu / gigabytes,
        store.counters()
    );
    Ok(())
}

/// Of this process, from `/proc/self/stat`, in ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
