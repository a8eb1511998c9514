//! Tensors as they are stored: each once, equal to what the `safetensors` crate reads, within the memory limit, and none
//! after a failure.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, OpenOptions},
    path::Path,
    sync::{RwLock, RwLockReadGuard, atomic::Ordering::Relaxed, mpsc},
    time::{Duration, Instant},
};

use longshore::{
    discover::discover,
    error::LoadError,
    tensors::{StreamProgress, Tensor, Tensors, TensorsOptions},
};
use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    scratch::Scratch,
};
use longshore_rank::{error::RankError, storage::IoChoice};
use safetensors::SafeTensors;

/// Threads are the process's: who counts them is alone, everyone else is not.
static THREADS: RwLock<()> = RwLock::new(());

fn together() -> RwLockReadGuard<'static, ()> {
    THREADS.read().unwrap_or_else(|e| e.into_inner())
}

/// dtype, shape and bytes
type Stored = (String, Vec<u64>, Vec<u8>);

/// What the format's own implementation reads.
fn oracle(dir: &Path) -> BTreeMap<String, Stored> {
    let mut all = BTreeMap::new();
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for path in paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        let file = fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&file).unwrap().iter() {
            let shape = view.shape().iter().map(|&d| d as u64).collect();
            let stored = (view.dtype().to_string(), shape, view.data().to_vec());
            assert!(all.insert(name.to_owned(), stored).is_none());
        }
    }
    all
}

fn with_checkpoint(checkpoint: Checkpoint, test: impl FnOnce(&Path)) {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    test(&dir);
}

fn open(dir: &Path, options: &TensorsOptions<'_>) -> Result<Tensors, LoadError> {
    Tensors::of(discover(dir).unwrap(), options)
}

fn next(tensors: &mut Tensors) -> Option<Tensor> {
    tensors.next().unwrap_or_else(|e| panic!("{}", e.line()))
}

fn assert_equal(tensor: &Tensor, stored: &Stored) {
    let name = tensor.name();
    assert_eq!((tensor.dtype().to_string(), tensor.shape()), (stored.0.clone(), &stored.1[..]));
    assert_eq!(tensor.bytes().len(), stored.2.len(), "{name}");
    let differs = tensor.bytes().iter().zip(&stored.2).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name}: first differing byte");
}

/// Everything that is left, each tensor once.
fn assert_all(tensors: &mut Tensors, mut wanted: BTreeMap<String, Stored>) {
    while let Some(tensor) = next(tensors) {
        let stored = wanted.remove(tensor.name());
        let stored = stored.unwrap_or_else(|| panic!("{}: twice or unwanted", tensor.name()));
        assert_equal(&tensor, &stored);
    }
    assert!(wanted.is_empty(), "missing: {:?}", wanted.keys());
}

fn largest(wanted: &BTreeMap<String, Stored>) -> u64 {
    wanted.values().map(|(_, _, bytes)| bytes.len() as u64).max().unwrap()
}

fn total(wanted: &BTreeMap<String, Stored>) -> u64 {
    wanted.values().map(|(_, _, bytes)| bytes.len() as u64).sum()
}

fn staging(progress: &StreamProgress) -> (u64, u64) {
    (progress.staging_bytes.load(Relaxed), progress.peak_staging_bytes.load(Relaxed))
}

fn checkpoints() -> Vec<Checkpoint> {
    vec![
        Checkpoint::new(Family::Llama, Scheme::Bf16),
        Checkpoint::new(Family::Qwen3Moe, Scheme::Bf16).preset(Preset::Odd),
        Checkpoint::new(Family::DeepseekV3, Scheme::Fp8),
        Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4),
        Checkpoint::new(Family::GlmMoeDsa, Scheme::Mxfp4),
        Checkpoint::new(Family::KimiK25, Scheme::Int4).set("unaligned", true),
    ]
}

/// Two pages more than a tensor of these bytes: it may lie across page boundaries at both ends.
fn around(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096) + 4096
}

/// Whatever the scheme, the way of reading and the room: all tensors, each once, each byte read once.
#[test]
fn every_tensor_arrives_once_and_whole() {
    let _together = together();
    for checkpoint in checkpoints() {
        let what = format!("{checkpoint:?}");
        with_checkpoint(checkpoint, |dir| {
            let wanted = oracle(dir);
            let least = around(largest(&wanted));
            for io in [IoChoice::Buffered, IoChoice::Direct] {
                for limit in [512 << 20, 4 * least, least] {
                    for concurrency in [None, Some(1), Some(7)] {
                        let options = TensorsOptions::default().memory_limit(limit).io(io);
                        let options = options.concurrency(concurrency);
                        let mut tensors = open(dir, &options).unwrap();
                        assert_all(&mut tensors, wanted.clone());
                        assert!(next(&mut tensors).is_none(), "it stays at its end");
                        let progress = tensors.progress();
                        assert_eq!(progress.read_bytes.load(Relaxed), total(&wanted), "{what}");
                        assert_eq!(progress.gap_bytes.load(Relaxed), 0);
                        assert_eq!(progress.tensors.load(Relaxed), wanted.len() as u64);
                        let (now, peak) = staging(&progress);
                        assert_eq!(now, 0, "{what} {io:?} {limit} {concurrency:?}");
                        assert!(0 < peak && peak <= limit, "{what}: {peak} of {limit}");
                    }
                }
            }
        });
    }
}

/// One read for what lies together, several for what is long.
#[test]
fn reads_are_large() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).files(2), |dir| {
        let wanted = oracle(dir);
        for io in [IoChoice::Buffered, IoChoice::Direct] {
            let mut tensors = open(dir, &TensorsOptions::default().io(io)).unwrap();
            assert_all(&mut tensors, wanted.clone());
            let reads = tensors.progress().reads.load(Relaxed);
            assert_eq!(reads, fs_files_in_reads(dir, 8 << 20), "{io:?}");
            // a limit of 512 KiB wants reads of 128 KiB
            let options = TensorsOptions::default().io(io).memory_limit(512 << 10);
            let mut tensors = open(dir, &options).unwrap();
            assert_all(&mut tensors, wanted.clone());
            let reads = tensors.progress().reads.load(Relaxed);
            let most = 2 * (total(&wanted) / (128 << 10) + 2);
            assert!(2 < reads && reads <= most, "{io:?}: {reads} reads, at most {most}");
        }
    });
}

/// The reads of `bytes` that whole files take.
fn fs_files_in_reads(dir: &Path, bytes: u64) -> u64 {
    let files = discover(dir).unwrap().checkpoint.files;
    files.iter().map(|file| file.bytes.div_ceil(bytes)).sum()
}

/// Only what is wanted is read, and short gaps between.
#[test]
fn a_filter_leaves_out_what_is_not_wanted() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::DeepseekV3, Scheme::Bf16), |dir| {
        let all = oracle(dir);
        for part in ["experts", "layernorm", "model.layers.1.", "nothing"] {
            let of_part = |name: &str| name.contains(part);
            let wanted: BTreeMap<_, _> =
                all.clone().into_iter().filter(|(name, _)| of_part(name)).collect();
            for io in [IoChoice::Buffered, IoChoice::Direct] {
                let mut tensors =
                    open(dir, &TensorsOptions::default().io(io).only(of_part)).unwrap();
                assert_all(&mut tensors, wanted.clone());
                let progress = tensors.progress();
                let gaps = progress.gap_bytes.load(Relaxed);
                assert_eq!(progress.read_bytes.load(Relaxed), total(&wanted) + gaps, "{part}");
                assert!(gaps <= (64 << 10) * wanted.len() as u64, "{part}: {gaps}");
            }
        }
    });
}

/// A consumer that takes its time, and one that holds as much as it may, keep the readers within the limit.
#[test]
fn memory_stays_within_its_limit_however_slow_the_consumer() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let wanted = oracle(dir);
        let limit = 3 * around(largest(&wanted));
        for io in [IoChoice::Buffered, IoChoice::Direct] {
            let mut tensors =
                open(dir, &TensorsOptions::default().io(io).memory_limit(limit)).unwrap();
            let progress = tensors.progress();
            let mut held = Vec::new();
            let mut left = wanted.clone();
            while let Some(tensor) = next(&mut tensors) {
                std::thread::sleep(Duration::from_millis(1));
                assert!(progress.staging_bytes.load(Relaxed) <= limit);
                let bytes = |t: &Tensor| around(t.bytes().len() as u64);
                held.push(tensor);
                while held.iter().map(bytes).sum::<u64>() > limit - around(largest(&wanted)) {
                    let first: Tensor = held.remove(0);
                    assert_equal(&first, &left.remove(first.name()).unwrap());
                }
            }
            held.iter().for_each(|t| assert_equal(t, &left[t.name()]));
            drop(tensors);
            let (now, peak) = staging(&progress);
            assert!(0 < now && peak <= limit, "{now} still held, at most {peak} of {limit}");
            drop(held);
            assert_eq!(staging(&progress).0, 0);
        }
    });
}

/// Holding everything while asking for more is an error that says so; with something dropped, it goes on.
#[test]
fn a_consumer_that_holds_all_memory_is_told_so() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let wanted = oracle(dir);
        let limit = 2 * around(largest(&wanted));
        let mut tensors = open(dir, &TensorsOptions::default().memory_limit(limit)).unwrap();
        let (mut held, mut seen, mut refusals) = (Vec::new(), HashMap::new(), 0);
        loop {
            match tensors.next() {
                Ok(Some(tensor)) => {
                    *seen.entry(tensor.name().to_owned()).or_insert(0) += 1;
                    held.push(tensor);
                }
                Ok(None) => break,
                Err(e) => {
                    let line = e.line();
                    assert!(line.contains(&limit.to_string()) && line.contains("drop"), "{line}");
                    let LoadError::Tensors {
                        source: RankError::StagingHeld { held: by, .. }, ..
                    } = e
                    else {
                        panic!("{line}")
                    };
                    assert!(0 < by && by <= limit);
                    assert!(!held.is_empty());
                    refusals += 1;
                    held.iter().for_each(|t| assert_equal(t, &wanted[t.name()]));
                    held.clear();
                }
            }
        }
        assert!(refusals > 0);
        assert_eq!(seen.len(), wanted.len());
        assert!(seen.values().all(|&times| times == 1));
    });
}

/// Tensors go to another thread, which drops them late; with patience that is no error.
#[test]
fn tensors_that_another_thread_holds_are_waited_for() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let wanted = oracle(dir);
        let options = TensorsOptions::default()
            .memory_limit(around(largest(&wanted)))
            .patience(Duration::from_secs(60));
        let mut tensors = open(dir, &options).unwrap();
        let (send, receive) = mpsc::channel::<Tensor>();
        let count = wanted.len();
        let late = std::thread::spawn(move || {
            for tensor in receive {
                std::thread::sleep(Duration::from_millis(2));
                assert_equal(&tensor, &wanted[tensor.name()]);
            }
        });
        let mut sent = 0;
        while let Some(tensor) = next(&mut tensors) {
            send.send(tensor).unwrap();
            sent += 1;
        }
        drop(send);
        late.join().unwrap();
        assert_eq!(sent, count);
        assert_eq!(staging(&tensors.progress()).0, 0);
    });
}

/// Before the first read, by name and with both figures.
#[test]
fn a_tensor_that_cannot_fit_is_refused_at_once() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let wanted = oracle(dir);
        let (limit, bytes) = (8192, largest(&wanted));
        let error = open(dir, &TensorsOptions::default().memory_limit(limit)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let line = error.line();
        assert!(line.contains("tensor ") && line.contains("8192"), "{line}");
        let LoadError::Tensors { source: RankError::TensorOverLimit { tensor, .. }, .. } = error
        else {
            panic!("{line}")
        };
        assert!(wanted[&tensor].2.len() as u64 <= bytes);
        assert!(line.contains(&wanted[&tensor].2.len().to_string()), "{line}");
        // what is not wanted need not fit
        let small = |name: &str| name.contains("norm");
        let options = TensorsOptions::default().memory_limit(limit).only(small);
        let norms = wanted.into_iter().filter(|(name, _)| small(name)).collect();
        assert_all(&mut open(dir, &options).unwrap(), norms);
    });
}

fn resize(dir: &Path, file: &str, bytes: u64) {
    OpenOptions::new().write(true).open(dir.join(file)).unwrap().set_len(bytes).unwrap();
}

/// Takes until an error; what came before it, and the error.
fn until_error(tensors: &mut Tensors) -> (usize, LoadError) {
    let mut count = 0;
    loop {
        match tensors.next() {
            Ok(Some(_)) => count += 1,
            Ok(None) => panic!("no error after {count} tensors"),
            Err(e) => return (count, e),
        }
    }
}

/// A file that shrinks or is written while others are read: named, and nothing is handed out afterwards.
#[test]
fn a_file_that_changes_meanwhile_ends_the_stream() {
    let _together = together();
    for io in [IoChoice::Buffered, IoChoice::Direct] {
        for shrink in [true, false] {
            with_checkpoint(Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).files(2), |dir| {
                let discovered = discover(dir).unwrap();
                let files = discovered.checkpoint.files.clone();
                let all = discovered.checkpoint.tensors.len();
                // one tensor at a time, so that the second file is far away when it changes
                let limit = around(largest(&oracle(dir)));
                let options = TensorsOptions::default().memory_limit(limit).io(io);
                let mut tensors = Tensors::of(discovered, &options).unwrap();
                drop(next(&mut tensors).unwrap());
                let (name, bytes) = (&files[1].name, files[1].bytes);
                if shrink {
                    resize(dir, name, bytes / 2);
                } else {
                    // as long as before, but written
                    resize(dir, name, bytes - 1);
                    resize(dir, name, bytes);
                }
                let (count, error) = until_error(&mut tensors);
                assert!(count + 1 < all, "{count} of {all}");
                assert!(error.line().contains(name), "{}", error.line());
                assert_eq!(error.exit_code(), 1);
                for _ in 0..3 {
                    let again = tensors.next().unwrap_err();
                    let over = RankError::StreamOver { why: String::new() };
                    let LoadError::Tensors { source, .. } = &again else { panic!("{again:?}") };
                    assert_eq!(std::mem::discriminant(source), std::mem::discriminant(&over));
                    assert!(again.line().contains(name), "{}", again.line());
                }
                let progress = tensors.progress();
                drop(tensors);
                assert_eq!(staging(&progress).0, 0);
            });
        }
    }
}

/// A file that is written after its last tensor was handed out: the tensors may not belong together.
#[test]
fn a_file_that_changes_before_the_end_is_an_error_instead_of_the_end() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let discovered = discover(dir).unwrap();
        let (count, file) =
            (discovered.checkpoint.tensors.len(), discovered.checkpoint.files[0].clone());
        let mut tensors = Tensors::of(discovered, &TensorsOptions::default()).unwrap();
        (0..count).for_each(|_| drop(next(&mut tensors).unwrap()));
        resize(dir, &file.name, file.bytes + 1);
        let error = tensors.next().unwrap_err();
        assert!(matches!(&error, LoadError::FileModified { path } if path.ends_with(&file.name)));
        assert!(tensors.next().is_err());
    });
}

#[test]
fn a_file_that_changed_since_discovery_is_refused() {
    let _together = together();
    with_checkpoint(Checkpoint::new(Family::Llama, Scheme::Bf16), |dir| {
        let discovered = discover(dir).unwrap();
        let file = discovered.checkpoint.files[0].clone();
        resize(dir, &file.name, file.bytes - 1);
        let error = Tensors::of(discovered, &TensorsOptions::default()).unwrap_err();
        assert!(matches!(error, LoadError::FileChanged { .. }), "{error:?}");
    });
}

fn readers() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("tensors-")).count()
}

/// Wherever a consumer stops, its readers stop too, and only what it holds is left.
#[test]
fn a_stream_that_is_dropped_early_leaves_nothing_behind() {
    let _alone = THREADS.write().unwrap_or_else(|e| e.into_inner());
    with_checkpoint(Checkpoint::new(Family::DeepseekV3, Scheme::Fp8), |dir| {
        let wanted = oracle(dir);
        for round in 0..30 {
            // now and then with readers that wait for memory
            let limit = around(largest(&wanted)) << (round % 3 * 4);
            let options = TensorsOptions::default().memory_limit(limit).concurrency(5);
            let mut tensors = open(dir, &options).unwrap();
            let progress = tensors.progress();
            for _ in 0..round {
                drop(next(&mut tensors));
            }
            let kept = next(&mut tensors).unwrap();
            let started = Instant::now();
            drop(tensors);
            assert!(started.elapsed() < Duration::from_secs(1), "took {:?}", started.elapsed());
            // joined threads leave the list of tasks a moment later
            let deadline = Instant::now() + Duration::from_secs(5);
            while readers() > 0 {
                assert!(Instant::now() < deadline, "{} readers are left", readers());
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_equal(&kept, &wanted[kept.name()]);
            assert!(staging(&progress).0 > 0, "what is held still counts");
            drop(kept);
            assert_eq!(staging(&progress).0, 0);
        }
    });
}

/// The entry by name.
#[test]
fn what_is_no_checkpoint_is_refused() {
    let _together = together();
    let refused = |source| Tensors::open(source, &TensorsOptions::default()).unwrap_err();
    assert_eq!(refused("ftp://bucket/model").exit_code(), 2);
    assert!(matches!(refused("/nowhere"), LoadError::Source { .. }));
}
