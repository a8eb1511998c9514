//! The conformance suite over NCCL: with as many devices as ranks, else with the emulated driver and NCCL.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, unreachable_pub, dead_code, reason = "test code")]

use std::{env, process::Command, sync::Arc, time::Duration};

use longshore_emulator::{NcclOptions, Options, emulated, emulated_nccl, library_dir};
use longshore_kernels::cuda::driver::{self, Device};
use longshore_nccl::Nccl;
use longshore_rank::collective::{
    Collective,
    nccl::{Form, NcclCollective},
};

mod conformance;

use conformance::{Ranks, SLOT_BYTES, SLOTS};

/// Ranks of the largest group of the suite.
const DEVICES: u32 = 5;

/// Whether this process has devices and NCCL; if not, runs `test` in one that has them emulated.
fn is_inside(test: &str, options: &Options, nccl: &NcclOptions) -> bool {
    const INSIDE: &str = "LONGSHORE_TEST_INSIDE";
    let enough = driver::probe().is_ok_and(|driver| driver.devices >= DEVICES);
    if env::var_os(INSIDE).is_some_and(|inside| inside == test) || (enough && Nccl::load().is_ok())
    {
        return true;
    }
    let Some(library) = library_dir(env!("CARGO_TARGET_TMPDIR")) else { return false };
    let mut again = Command::new(env::current_exe().unwrap());
    emulated(&mut again, library, options);
    emulated_nccl(&mut again, nccl);
    let ran = again.args([test, "--exact", "--nocapture"]).env(INSIDE, test).output().unwrap();
    let told = [&ran.stdout[..], &ran.stderr[..]].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(ran.status.success() && told.contains("1 passed"), "{told}");
    false
}

/// Joins ranks that are threads, each with a device of its own.
fn group(world_size: u32) -> Ranks {
    let id = Nccl::load().unwrap().unique_id().unwrap();
    let form = Form { world_size, slots: SLOTS, slot_bytes: SLOT_BYTES, depth: 4 };
    let join = |rank| {
        let device = Device::open(rank).unwrap();
        let limit = Duration::from_secs(20);
        let joined = NcclCollective::connect(rank, form, &device, id, false, limit);
        Arc::new(joined.unwrap()) as Arc<dyn Collective>
    };
    std::thread::scope(|scope| {
        let joining: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || join(rank))).collect();
        joining.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn late(seed: u64) -> Options {
    Options { devices: DEVICES, seed, delay_us_max: 200, ..Options::default() }
}

#[test]
fn nccl_conforms() {
    if is_inside("nccl_conforms", &late(0), &NcclOptions::default()) {
        conformance::run_in_agreement(group);
    }
}

#[test]
fn nccl_conforms_when_streams_run_late() {
    if is_inside("nccl_conforms_when_streams_run_late", &late(7), &NcclOptions::default()) {
        conformance::run_in_agreement(group);
    }
}
