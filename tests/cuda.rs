//! Parameters on devices: the same bytes as in the host's memory, through the real driver where there is a device, else through
//! the emulated one, whose streams run late and in random order.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use longshore::{
    DeviceChoice, Load, Place, Secret,
    digest::group_digest,
    load::{RunOptions, load, progress_of},
    plan::Exchange,
    processes::Transport,
};
use longshore_emulator::{NcclOptions, Options, emulated_nccl, log};
use longshore_harness::{
    cases, compare,
    generator::{Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_kernels::cuda::driver::{self, Device};
use longshore_models::checkpoint::Tensor;

mod common;
#[path = "common/cuda.rs"]
mod cuda;
#[path = "common/mixed.rs"]
mod mixed;

use common::{plan, runtime};
use cuda::{Cuda, json, program, refusal};
use mixed::{mix, settle};

/// A driver whose streams run late: at random times, or only when somebody waits for them.
fn late(seed: u64) -> Options {
    let devices = 8;
    match seed % 3 {
        0 => Options { late_us: 20_000, devices, ..Options::default() },
        _ => Options { seed, delay_us_max: 300, devices, ..Options::default() },
    }
}

fn written(scratch: &Scratch, checkpoint: &Checkpoint) -> std::path::PathBuf {
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    dir
}

fn load_case(cuda: Cuda, case: &cases::Case, seed: u64, extra: &[&str]) {
    load_case_on(cuda, case, &late(seed), extra);
}

fn load_case_on(cuda: Cuda, case: &cases::Case, options: &Options, extra: &[&str]) {
    let scratch = Scratch::new().unwrap();
    let (checkpoint, out) = (written(&scratch, &case.checkpoint), scratch.join("out"));
    let run = cuda
        .longshore(options)
        .args(["load", "--log-level", "error", "--device", "cuda"])
        .arg(&checkpoint)
        .args(case.options.arguments())
        .arg("--out")
        .arg(&out)
        .args(extra)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{} {extra:?}: {complaint}", case.name);
    assert_eq!(complaint, "", "{} {extra:?}", case.name);
    compare::with_case(&out, case).unwrap_or_else(|e| panic!("{} {extra:?}: {e}", case.name));
}

#[test]
fn every_public_case_is_byte_exact_on_a_device() {
    let Some(cuda) = Cuda::find() else { return };
    let mut seen = 0;
    for (case, seed) in cases::cases().iter().zip(1..) {
        load_case(cuda, case, seed, &["--exchange", "on", "--io", "buffered"]);
        load_case(cuda, case, seed + 100, &["--exchange", "off", "--io", "direct"]);
        // reads of 64 KiB, two slabs of staging
        load_case(cuda, case, seed + 200, &["--memory-limit", "160KiB", "--io", "direct"]);
        seen += 1;
    }
    assert_eq!(seen, 20);
}

#[test]
fn every_public_case_is_byte_exact_on_the_devices_of_processes() {
    let Some(cuda) = Cuda::find() else { return };
    for (case, seed) in cases::cases().iter().zip(1..).filter(|(case, _)| case.options.tp > 1) {
        let transport = ["host", "tcp"][seed as usize % 2];
        load_case(cuda, case, seed, &["--ranks", "processes", "--transport", transport]);
    }
}

/// What a rank reads, all ranks of its host see, and not all of them want of it.
#[test]
fn reads_that_some_ranks_want_nothing_of_reach_the_devices_of_processes() {
    let Some(cuda) = Cuda::find() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = written(&scratch, &Checkpoint::new(Family::Qwen3Moe, Scheme::Bf16));
    let digest = |device: &str, extra: &[&str]| {
        let mut command = cuda.longshore(&late(4));
        command.args(["load", "--json", "--log-level", "error", "--tp", "4"]).arg(&dir);
        command.args(["--device", device, "--read-size", "64KiB"]);
        json(command.args(extra))["digest"].clone()
    };
    let on_host = digest("cpu", &[]);
    for transport in ["host", "tcp"] {
        let extra = ["--ranks", "processes", "--transport", transport, "--exchange", "on"];
        assert_eq!(digest("cuda", &extra), on_host, "{transport}");
    }
}

/// Over NCCL: a device for each rank, and all ranks on one.
#[test]
fn every_public_case_is_byte_exact_over_nccl() {
    let Some(cuda) = Cuda::find() else { return };
    if let Err(e) = cuda.nccl() {
        eprintln!("ignored: {e}");
        return;
    }
    for (case, seed) in cases::cases().iter().zip(1..).filter(|(case, _)| case.options.tp > 1) {
        let devices = [1, 8][seed as usize % 2];
        let extra = ["--ranks", "processes", "--transport", "nccl", "--exchange", "on"];
        load_case_on(cuda, case, &Options { devices, ..late(seed) }, &extra);
    }
}

/// What a rank has sent may still be on its way when it is complete itself: it keeps its end until all ranks are.
#[test]
fn no_rank_leaves_an_exchange_over_nccl_before_all_are_complete() {
    let Some(cuda) = Cuda::emulated() else { return };
    for seed in 0..4 {
        let scratch = Scratch::new().unwrap();
        let (dir, record) = (llama(&scratch), scratch.join("log"));
        let options = Options { log: Some(record.clone()), devices: 4, ..late(seed) };
        let options = Options { delay_us_max: 20_000, ..options };
        let mut command = cuda.longshore(&options);
        command.args(["load", "--log-level", "error", "--device", "cuda", "--tp", "4"]).arg(&dir);
        command.args(["--ranks", "processes", "--transport", "nccl", "--exchange", "on"]);
        command.args(["--read-size", "64KiB", "--no-digest"]);
        assert!(command.output().unwrap().status.success());
        let lines = log::read(&record).unwrap();
        let moved = log::operations(&lines).filter(|op| op.kind == "nccl");
        let last = moved.map(|op| op.ran_ns.end).max().unwrap();
        let freed = |line: &log::Line| matches!(line, log::Line::Memory(m) if m.kind == "free" && m.at_ns < last);
        assert!(!lines.iter().any(freed), "seed {seed}");
    }
}

/// Asked for, NCCL is used or refused with what stands against it; where there is nothing to exchange, nothing does.
#[test]
fn nccl_that_is_asked_for_is_used_or_refused_in_one_line() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    let load = |extra: &[&str]| {
        let mut command = cuda.longshore(&late(6));
        command.args(["load", "--json", "--log-level", "error", "--ranks", "processes"]);
        command.args(["--transport", "nccl"]).args(extra).arg(&dir);
        command
    };
    for nothing in [&["--tp", "1"][..], &["--tp", "2", "--exchange", "off"]] {
        let told = json(load(nothing).args(["--device", "cuda", "--memory-limit", "1MiB"]));
        assert_eq!(told["device"], "cuda");
    }
    for (extra, want) in [
        (["--device", "cpu", "--memory-limit", "1MiB"], "--transport nccl: parameters live in"),
        (["--device", "cuda", "--memory-limit", "200KiB"], "NCCL between 2 ranks needs 5"),
    ] {
        let (line, code) = refusal(load(&["--tp", "2", "--exchange", "on"]).args(extra));
        assert!(line.contains(want), "{line}");
        assert_eq!(code, 2, "{line}");
    }
}

/// Without the library, what has not been asked for is done without it, and one rank says so.
#[test]
fn ranks_without_nccl_go_on_with_one_warning() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    let mut command = cuda.longshore(&late(6));
    command.env("LONGSHORE_NCCL_LIB", scratch.join("nothing"));
    command.args(["load", "--json", "--log-level", "warn", "--tp", "4", "--device", "cuda"]);
    let ran =
        command.args(["--ranks", "processes", "--exchange", "on"]).arg(&dir).output().unwrap();
    let told = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{told}");
    assert!(told.contains("ranks exchange through host memory: no NCCL library"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

/// Launchers may show each rank its own device alone: then all of them have the same number.
#[test]
fn ranks_that_see_one_device_each_exchange_over_nccl() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let (dir, record) = (llama(&scratch), scratch.join("log"));
    let options = Options { log: Some(record.clone()), ..late(6) };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = |rank: &str| {
        let mut command = cuda.longshore(&options);
        command.env("CUDA_VISIBLE_DEVICES", rank).env("RANK", rank).env("LOCAL_RANK", rank);
        command.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.args(["rank", "--log-level", "error", "--device", "cuda", "--exchange", "on"]);
        command.arg(&dir).stdout(Stdio::null()).spawn().unwrap()
    };
    for mut rank in [start("0"), start("1")] {
        assert!(rank.wait().unwrap().success());
    }
    let lines = log::read(&record).unwrap();
    let over_nccl =
        |device| log::operations(&lines).any(|op| op.kind == "nccl" && op.device == device);
    assert!(over_nccl(0) && over_nccl(1));
}

/// Device memory that this process has taken and not given back.
fn allocated() -> u64 {
    let devices = 0..driver::probe().unwrap().devices;
    devices.map(|ordinal| Device::open(ordinal).unwrap().allocated_bytes()).sum()
}

/// A load gives back what it has set aside on devices before it says that it is done: a server measures then what it can
/// take for itself.
#[test]
fn nothing_but_parameters_is_left_of_a_load_on_its_devices() {
    let Some(cuda) = Cuda::find() else { return };
    if !cuda.is_inside("nothing_but_parameters_is_left_of_a_load_on_its_devices", &late(2)) {
        return;
    }
    let scratch = Scratch::new().unwrap();
    let nvfp4 = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4);
    let dir = written(&scratch, &nvfp4);
    let whole = plan(&dir, &oracle::Options::tp(2), Exchange::On).unwrap();
    let run = RunOptions { device: DeviceChoice::Cuda, ..RunOptions::default() };
    for _ in 0..5 {
        let mut group = runtime().block_on(load(&whole, &run, progress_of(&whole))).unwrap();
        let parameters: u64 = group.ranks().unwrap().iter().map(|r| r.allocated_bytes()).sum();
        assert_eq!(allocated(), parameters);
        runtime().block_on(group.reload(&whole, progress_of(&whole))).unwrap();
        assert_eq!(allocated(), parameters);
        drop(group);
        assert_eq!(allocated(), 0);
    }
}

/// Threads of this process; a stream of the emulated driver is one as well.
fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// However loads end, in whatever order and on whatever thread what they gave is dropped: in the end nothing is left of them.
#[test]
fn many_loads_in_a_row_leave_no_memory_threads_or_streams() {
    let Some(cuda) = Cuda::find() else { return };
    if !cuda.is_inside("many_loads_in_a_row_leave_no_memory_threads_or_streams", &late(7)) {
        return;
    }
    let scratch = Scratch::new().unwrap();
    let dirs = ["good", "bad"].map(|name| scratch.join(name));
    for dir in &dirs {
        with_scales(dir, dir.ends_with("bad"));
    }
    let source = |dir: &Path| dir.to_str().unwrap().to_owned();
    let load = |dir: &Path| {
        let load = Load::from(source(dir)).tensor_parallel(2).device(DeviceChoice::Cuda);
        load.memory_limit(1 << 20)
    };
    let settle = |threads_most: usize| {
        let begun = Instant::now();
        while allocated() > 0 || threads() > threads_most {
            let (bytes, threads) = (allocated(), threads());
            assert!(begun.elapsed() < Duration::from_secs(20), "{bytes} bytes, {threads} threads");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let mut kept = Vec::new();
    let mut threads_most = usize::MAX;
    for round in 0..12 {
        match round % 4 {
            0 => {
                let mut loaded = load(&dirs[0]).start().unwrap().wait().unwrap();
                let failed = loaded.reload(source(&dirs[1])).unwrap_err();
                assert!(failed.line().contains("needs a positive k_scale"), "{}", failed.line());
                assert!(loaded.ranks().is_ok(), "the old weights are back");
                kept.push(loaded);
            }
            1 => drop(load(&dirs[1]).start().unwrap().wait().unwrap_err()),
            2 => drop(load(&dirs[0]).start().unwrap()),
            _ => {
                let loaded = load(&dirs[0]).start().unwrap().wait().unwrap();
                std::thread::scope(|scope| scope.spawn(|| drop(loaded)).join().unwrap());
                kept.clear();
                settle(threads_most);
                // those of the process itself, once it has loaded
                threads_most = threads_most.min(threads());
            }
        }
    }
}

/// The same of ranks that are processes, here with a thread in the place of each, while they stay in touch.
#[test]
fn ranks_that_stay_in_touch_hold_nothing_but_parameters_on_their_devices() {
    let Some(cuda) = Cuda::find() else { return };
    let name = "ranks_that_stay_in_touch_hold_nothing_but_parameters_on_their_devices";
    if !cuda.is_inside(name, &late(2)) {
        return;
    }
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    let secret = Secret::random_text().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for transport in [Transport::Host, Transport::Nccl] {
        let join = |rank: u32| {
            let place = Place::new(rank, 2, "127.0.0.1", port).unwrap();
            let place = place.local_rank(rank, 2).unwrap().secret(Secret::from_text(&secret));
            let load = Load::from(dir.to_str().unwrap()).device(DeviceChoice::Cuda);
            let mut rank = load.transport(transport).join(place).unwrap().wait().unwrap();
            rank.barrier().unwrap();
            let held = allocated();
            rank.barrier().unwrap();
            (held, rank.leave().unwrap())
        };
        let (a, b) = std::thread::scope(|scope| {
            let other = scope.spawn(|| join(1));
            (join(0), other.join().unwrap())
        });
        let parameters = allocated();
        assert_eq!((a.0, b.0), (parameters, parameters), "{transport:?}");
        drop((a, b));
        assert_eq!(allocated(), 0, "{transport:?}");
    }
}

/// A rank is killed while the others exchange with it over NCCL: they end at once, and say whose fault it was; also where NCCL
/// itself hangs.
#[test]
fn a_rank_that_is_killed_ends_the_others_also_in_nccl() {
    let Some(cuda) = Cuda::emulated() else { return };
    for fail in [&[][..], &["ncclCommAbort:1=hang".to_owned()]] {
        let scratch = Scratch::new().unwrap();
        let dir = llama(&scratch);
        let mut command = cuda.longshore(&late(9));
        emulated_nccl(&mut command, &NcclOptions { fail: fail.to_vec(), ..NcclOptions::default() });
        command.args(["load", "--log-level", "error", "--device", "cuda", "--tp", "4"]).arg(&dir);
        command.args(["--ranks", "processes", "--transport", "nccl", "--read-size", "64KiB"]);
        command.args(["--on-loss", "fail"]).env("LONGSHORE_FAULT", "rank=2,read=2,do=exit");
        let begun = Instant::now();
        let ran = command.output().unwrap();
        let told = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(told.contains("rank 2"), "{told}");
        assert!(!ran.status.success() && begun.elapsed() < Duration::from_secs(20), "{told}");
    }
}

/// A rank is killed in the middle: one that is started in its place, or the ranks that are left, complete the load with the bytes
/// of the host's, however they exchange.
#[test]
fn a_load_onto_devices_survives_the_loss_of_a_rank() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = written(&scratch, &Checkpoint::new(Family::DeepseekV3, Scheme::Bf16));
    let mut seed = 20;
    let on_host = |tp: &str| {
        let mut command = Command::new(program());
        command.args(["load", "--json", "--log-level", "error", "--tp", tp]).arg(&dir);
        json(&mut command)["digest"].clone()
    };
    let wants = [("wait", on_host("4")), ("shrink", on_host("2"))];
    for transport in ["nccl", "host", "tcp"] {
        for point in ["allocated", "prepared", "started", "read", "ready"] {
            for (on_loss, want) in &wants {
                seed += 1;
                let what = format!("{transport}, killed when {point}, {on_loss}");
                let mut command = cuda.longshore(&late(seed));
                emulated_nccl(&mut command, &NcclOptions::default());
                command.args(["load", "--json", "--log-level", "error", "--device", "cuda"]);
                command.args(["--tp", "4", "--ranks", "processes", "--read-size", "64KiB"]);
                command.args(["--transport", transport, "--on-loss", on_loss]).arg(&dir);
                let fault = format!("rank=2,generation=1,at={point},do=kill");
                command.env("LONGSHORE_FAULT", fault);
                let report = json(&mut command);
                assert_eq!(&report["digest"], want, "{what}");
                assert_eq!(report["restarts"], 1, "{what}");
                for rank in report["ranks"].as_array().unwrap() {
                    assert_eq!(rank["final_staging_bytes"], 0, "{what}");
                }
            }
        }
    }
}

/// Every family and scheme, also with experts in groups: digest and counters of the host's load, staging within its limit and
/// back at zero, device memory within parameters, limit and workspace.
#[test]
fn devices_hold_and_count_what_the_host_does() {
    const LIMIT: u64 = 1 << 20;
    let Some(cuda) = Cuda::find() else { return };
    let mut seed = 0;
    for &family in Family::ALL {
        for &scheme in family.schemes() {
            let scratch = Scratch::new().unwrap();
            let dir = written(&scratch, &Checkpoint::new(family, scheme).preset(Preset::Odd));
            for options in [&["--tp", "2"][..], &["--tp", "4", "--ep", "2"]] {
                seed += 1;
                let load = |device: &str| {
                    let mut command = cuda.longshore(&late(seed));
                    command.args(["load", "--json", "--log-level", "error", "--device", device]);
                    command.args(["--memory-limit", "1MiB"]).args(options).arg(&dir);
                    command
                };
                let what = format!("{family:?} {scheme:?} {options:?}");
                if !load("cpu").output().unwrap().status.success() {
                    // odd sizes that cannot be cut are refused on both
                    assert_eq!(refusal(&mut load("cpu")), refusal(&mut load("cuda")), "{what}");
                    continue;
                }
                let (host, device) = (json(&mut load("cpu")), json(&mut load("cuda")));
                assert_eq!((&host["device"], &device["device"]), (&"cpu".into(), &"cuda".into()));
                assert_eq!(host["digest"], device["digest"], "{what}");
                for (host, device) in host["ranks"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .zip(device["ranks"].as_array().unwrap())
                {
                    for same in ["storage_bytes_read", "received_bytes", "sent_bytes"] {
                        assert_eq!(host[same], device[same], "{what}: {same}");
                    }
                    let number = |name: &str| device[name].as_u64().unwrap();
                    assert!(number("peak_staging_bytes") <= LIMIT, "{what}");
                    assert_eq!(number("final_staging_bytes"), 0, "{what}");
                    if cuda.is_emulated() {
                        // a device for each rank; tables, and the gaps between parameters
                        let most = number("parameter_bytes") + LIMIT + WORKSPACE;
                        let most = most + 512 * number("parameters");
                        assert!(number("peak_device_bytes") <= most, "{what}: {device}");
                    }
                }
            }
        }
    }
    assert!(seed >= 30, "only {seed} loads");
}

/// What the largest finish of these small models works in, and the tables of permutations.
const WORKSPACE: u64 = 256 << 10;

#[test]
fn a_reload_on_devices_gives_what_a_fresh_load_gives_at_the_same_addresses() {
    let Some(cuda) = Cuda::find() else { return };
    let name = "a_reload_on_devices_gives_what_a_fresh_load_gives_at_the_same_addresses";
    if !cuda.is_inside(name, &late(5)) {
        return;
    }
    let run = RunOptions { device: DeviceChoice::Cuda, ..RunOptions::default() };
    for (family, scheme, layout) in [
        (Family::Llama, Scheme::Bf16, None),
        (Family::DeepseekV3, Scheme::Nvfp4, Some("trtllm")),
        (Family::GlmMoeDsa, Scheme::Mxfp4, Some("aiter")),
        (Family::KimiK25, Scheme::Nvfp4, Some("trtllm")),
    ] {
        let scratch = Scratch::new().unwrap();
        let mut options = oracle::Options::tp(2);
        options.kernel_layout = layout.map(str::to_owned);
        let [a, b, mixed] = ["a", "b", "mixed"].map(|name| scratch.join(name));
        for (dir, seed) in [(&a, 1), (&b, 2)] {
            Checkpoint::new(family, scheme).seed(seed).write(dir).unwrap();
        }
        mix(&a, &b, &mixed, |file| file == 2);
        settle(scratch.path());
        let plans = [a, b, mixed].map(|dir| plan(&dir, &options, Exchange::On).unwrap());
        let start = |plan, run: &RunOptions| {
            runtime()
                .block_on(load(plan, run, progress_of(plan)))
                .unwrap_or_else(|e| panic!("{family:?} {scheme:?}: {}", e.line()))
        };
        let fresh = plans.each_ref().map(|plan| {
            group_digest(start(plan, &RunOptions::default()).ranks().unwrap()).unwrap()
        });
        let mut group = start(&plans[0], &run);
        let addresses = |group: &longshore::group::Group| -> Vec<u64> {
            let ranks = group.ranks().unwrap();
            ranks.iter().flat_map(|rank| rank.iter().map(|p| p.data.address())).collect()
        };
        let first = addresses(&group);
        // of the third another file is other than of the first, so the rest of it stays
        for (next, stays) in [(1, false), (0, false), (2, true), (2, true), (0, true), (1, false)] {
            let done = runtime().block_on(group.reload(&plans[next], progress_of(&plans[next])));
            done.unwrap_or_else(|e| panic!("{family:?} {scheme:?}: {}", e.line()));
            let digest = group_digest(group.ranks().unwrap()).unwrap();
            assert_eq!(digest, fresh[next], "{family:?} {scheme:?}");
            assert_eq!(addresses(&group), first, "{family:?} {scheme:?}");
            assert_eq!(group.kept_bytes > 0, stays, "{family:?} {scheme:?}");
        }
    }
}

fn llama(scratch: &Scratch) -> std::path::PathBuf {
    written(scratch, &Checkpoint::new(Family::Llama, Scheme::Bf16))
}

fn to_device(cuda: Cuda, options: &Options, dir: &Path, extra: &[&str]) -> Command {
    let mut command = cuda.longshore(options);
    command.args(["load", "--log-level", "error", "--tp", "2", "--device", "cuda"]).arg(dir);
    command.args(extra);
    command
}

/// Without a driver: one clear line, before anything is read. (A default picks the host's memory.)
#[test]
fn devices_that_are_not_there_are_refused_in_one_line() {
    if driver::probe().is_ok() {
        eprintln!("ignored: there is a driver");
        return;
    }
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    for extra in [&[][..], &["--ranks", "processes"]] {
        let mut command = Command::new(program());
        command.args(["load", "--log-level", "error", "--tp", "2", "--device", "cuda"]);
        let (line, code) = refusal(command.arg(&dir).args(extra));
        let want = "longshore: --device cuda: CUDA cannot be used: no driver library (libcuda.so.1) is installed";
        assert_eq!((line.as_str(), code), (want, 2), "{extra:?}");
    }
    let mut command = Command::new(program());
    let told =
        json(command.args(["load", "--json", "--log-level", "error", "--tp", "2"]).arg(&dir));
    assert_eq!(told["device"], "cpu");
}

#[test]
fn what_a_driver_cannot_do_is_refused_in_one_line() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    for (options, want) in [
        (Options { devices: 0, ..Options::default() }, "finds no device"),
        (Options { driver_version: 12020, ..Options::default() }, "12.8"),
        (Options { memory_bytes: 1 << 20, ..Options::default() }, "are free on device"),
    ] {
        for extra in [&[][..], &["--ranks", "processes"]] {
            let (line, code) = refusal(&mut to_device(cuda, &options, &dir, extra));
            assert!(line.contains(want), "{line}");
            assert_eq!(code, 2, "{line}");
        }
    }
}

/// Whatever the driver fails at, the load ends soon with one line that says so, and hands nothing out.
#[test]
fn a_device_that_fails_ends_the_load_in_one_line() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let nvfp4 = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4);
    let (dir, out) = (written(&scratch, &nvfp4), scratch.join("out"));
    let mut failed = 0;
    for kind in
        ["alloc", "register", "copy", "memset", "launch", "event", "record", "stream", "module"]
    {
        for n in [1, 2, 5, 17] {
            for error in ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_OUT_OF_MEMORY"] {
                let fail = vec![format!("{kind}:{n}={error}")];
                let options = Options { fail, ..late(n) };
                let begun = Instant::now();
                let out_argument = out.to_str().unwrap();
                let extra = ["--out", out_argument, "--memory-limit", "1MiB", "--no-digest"];
                let ran = to_device(cuda, &options, &dir, &extra).output().unwrap();
                let line = String::from_utf8_lossy(&ran.stderr).into_owned();
                let what = format!("{kind}:{n}={error}: {line}");
                assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
                if ran.status.success() {
                    // fewer calls than that
                    fs::remove_dir_all(&out).unwrap();
                    continue;
                }
                failed += 1;
                assert!(ran.status.code().is_some(), "{what}");
                assert!(!line.contains("panicked"), "{what}");
                assert!(line.contains("longshore: "), "{what}");
                assert!(!out.join("manifest.json").exists(), "{what}");
            }
        }
    }
    assert!(failed > 30, "only {failed} failures");
}

/// A device that does not get on is found by the deadline, like any other hang.
#[test]
fn a_device_that_hangs_is_found() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = llama(&scratch);
    let options = Options { operation_us_min: 20_000_000, ..Options::default() };
    let begun = Instant::now();
    let (line, code) =
        refusal(&mut to_device(cuda, &options, &dir, &["--progress-timeout", "0.5"]));
    assert!(line.contains("has not got on for"), "{line}");
    assert_eq!(code, 1);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

/// Writes a model with scales of its KV cache, which contradict each other or do not.
fn with_scales(dir: &Path, contradict: bool) {
    let kv = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("quant_style", "v31");
    kv.write(dir).unwrap();
    if !contradict {
        return;
    }
    let whole = plan(dir, &oracle::Options::tp(2), Exchange::On).unwrap();
    let scale = |t: &&Tensor| t.name.ends_with("k_proj.k_scale");
    let tensor = whole.checkpoint().tensors.iter().find(scale).unwrap();
    let path = dir.join(whole.checkpoint().file_name(tensor));
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&(-1.0f32).to_le_bytes(), tensor.file_range.start).unwrap();
}

/// Scales that contradict each other are refused in the words of the host.
#[test]
fn values_are_refused_as_on_the_host() {
    let Some(cuda) = Cuda::find() else { return };
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    with_scales(&dir, true);
    let load = |device: &str| {
        let mut command = cuda.longshore(&late(3));
        command.args(["load", "--log-level", "error", "--tp", "1", "--device", device]).arg(&dir);
        refusal(&mut command)
    };
    let host = load("cpu");
    assert!(host.0.contains("needs a positive k_scale, found -1"), "{}", host.0);
    assert_eq!(host.1, 2);
    assert_eq!(load("cuda"), host);
}

/// Copies go on while kernels run, and reads while both do: no stage waits for another to end.
#[test]
fn reads_copies_and_kernels_overlap() {
    let Some(cuda) = Cuda::emulated() else { return };
    let scratch = Scratch::new().unwrap();
    let (dir, record) = (llama(&scratch), scratch.join("log"));
    let options =
        Options { operation_us_min: 30_000, log: Some(record.clone()), ..Options::default() };
    let extra = ["--read-size", "64KiB", "--memory-limit", "2MiB", "--no-digest"];
    let told = json(to_device(cuda, &options, &dir, &extra).arg("--json"));
    let lines = log::read(&record).unwrap();
    // what is reported is what the driver saw
    assert_eq!(told["ranks"][0]["peak_device_bytes"], log::peak_bytes(&lines, 0));
    let of = |kind: &'static str| {
        log::operations(&lines).filter(move |op| op.device == 0 && op.kind == kind)
    };
    let placed = |op: &&log::Operation| op.name == "place";
    let at_once = |a: &log::Operation, b: &log::Operation| {
        a.stream != b.stream && a.ran_ns.start < b.ran_ns.end && b.ran_ns.start < a.ran_ns.end
    };
    let copied_meanwhile = of("htod")
        .filter(|op| op.bytes > 4096)
        .filter(|copy| of("kernel").filter(placed).any(|kernel| at_once(copy, kernel)));
    let copies = of("htod").filter(|op| op.bytes > 4096).count();
    // most of them do; a machine that is busy with other tests may delay some
    assert!(copied_meanwhile.count() > 2, "{copies} copies");
    // what is read later is handed over before what was read first is placed
    let first_placed = of("kernel").find(placed).unwrap().ran_ns.end;
    let handed_over = of("htod").filter(|op| op.bytes > 4096 && op.queued_ns < first_placed);
    assert!(handed_over.count() > 1, "{copies} copies");
}
