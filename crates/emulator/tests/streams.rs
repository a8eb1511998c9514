//! Streams, events and copies: what is ordered by them, and what is not.

#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod driver;

use std::ptr::null_mut;

use driver::{Driver, Gate, Handle, LINEAR, NON_BLOCKING, NOT_READY, NULL_STREAM, driver, ok};
use longshore_emulator::{Options, log};

const BYTES: usize = 10_000;

/// A copy is queued while the stream is held back, and its source then changes: what arrives?
fn arrives_after_change(driver: &Driver, source: &mut [u8]) -> Vec<u8> {
    let (stream, to) = (driver.stream(), driver.alloc(source.len()));
    let gate = Gate::close(driver, stream);
    ok(driver.cuMemcpyHtoDAsync_v2(to, source.as_ptr().cast(), source.len(), stream));
    source.fill(2);
    gate.open();
    ok(driver.cuStreamSynchronize(stream));
    driver.contents(to, source.len())
}

#[test]
fn pinned_memory_is_read_when_the_stream_gets_there() {
    let name = "pinned_memory_is_read_when_the_stream_gets_there";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let pinned = driver.pinned(BYTES, 1);
    assert_eq!(arrives_after_change(&driver, pinned), [2; BYTES]);
    let mut registered = vec![1; BYTES];
    ok(driver.cuMemHostRegister_v2(registered.as_mut_ptr().cast(), BYTES, 0));
    assert_eq!(arrives_after_change(&driver, &mut registered), [2; BYTES]);
}

#[test]
fn pageable_memory_is_read_during_the_call() {
    let name = "pageable_memory_is_read_during_the_call";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    assert_eq!(arrives_after_change(&driver, &mut vec![1; BYTES]), [1; BYTES]);
}

/// The call returns once the source is read: nothing says that other streams see the copy.
#[test]
fn a_synchronous_copy_of_pageable_memory_may_come_late() {
    let name = "a_synchronous_copy_of_pageable_memory_may_come_late";
    let options = Options { operation_us_min: 200_000, ..Options::default() };
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let (to, seen) = (driver.alloc(BYTES), driver.pinned(BYTES, 0));
    ok(driver.cuMemsetD8Async(to, 1, BYTES, NULL_STREAM));
    ok(driver.cuCtxSynchronize());
    // held back by a stream that the null stream waits for
    let mut blocking = null_mut();
    ok(driver.cuStreamCreate(&raw mut blocking, 0));
    ok(driver.cuMemcpyHtoD_v2(to, [2u8; BYTES].as_ptr().cast(), BYTES));
    assert_eq!(driver.cuStreamQuery(NULL_STREAM), NOT_READY);
    ok(driver.cuCtxSynchronize());
    ok(driver.cuMemcpyDtoHAsync_v2(seen.as_mut_ptr().cast(), to, BYTES, blocking));
    ok(driver.cuStreamSynchronize(blocking));
    assert_eq!(seen, [2; BYTES]);
}

#[test]
fn an_event_is_complete_once_its_stream_has_come_to_it() {
    let name = "an_event_is_complete_once_its_stream_has_come_to_it";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (stream, event) = (driver.stream(), driver.event());
    // never recorded: as if complete
    ok(driver.cuEventQuery(event));
    ok(driver.cuEventSynchronize(event));
    let gate = Gate::close(&driver, stream);
    ok(driver.cuEventRecord(event, stream));
    assert_eq!(driver.cuEventQuery(event), NOT_READY);
    assert_eq!(driver.cuStreamQuery(stream), NOT_READY);
    gate.open();
    ok(driver.cuEventSynchronize(event));
    ok(driver.cuEventQuery(event));
    ok(driver.cuStreamSynchronize(stream));
    ok(driver.cuStreamQuery(stream));
    ok(driver.cuEventDestroy_v2(event));
    ok(driver.cuStreamDestroy_v2(stream));
}

/// A stream that waits for an event does so for what was recorded by then, not for what is recorded later.
#[test]
fn streams_wait_for_the_last_recording_before_the_wait() {
    let name = "streams_wait_for_the_last_recording_before_the_wait";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (first, second, event) = (driver.stream(), driver.stream(), driver.event());
    let gate = Gate::close(&driver, first);
    ok(driver.cuEventRecord(event, first));
    ok(driver.cuStreamWaitEvent(second, event, 0));
    let later = Gate::close(&driver, first);
    ok(driver.cuEventRecord(event, first));
    assert_eq!(driver.cuStreamQuery(second), NOT_READY);
    gate.open();
    ok(driver.cuStreamSynchronize(second));
    assert_eq!(driver.cuEventQuery(event), NOT_READY);
    later.open();
    ok(driver.cuEventSynchronize(event));
}

#[test]
fn the_null_stream_orders_streams_that_block_and_no_others() {
    let name = "the_null_stream_orders_streams_that_block_and_no_others";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let mut streams = [null_mut(); 2];
    for (flags, stream) in [0, NON_BLOCKING].into_iter().zip(&mut streams) {
        ok(driver.cuStreamCreate(stream, flags));
    }
    let [blocking, other] = streams;
    let memory = driver.alloc(BYTES);
    let gate = Gate::close(&driver, NULL_STREAM);
    ok(driver.cuMemsetD8Async(memory, 1, BYTES, blocking));
    ok(driver.cuMemsetD8Async(memory, 2, BYTES, other));
    ok(driver.cuStreamSynchronize(other));
    assert_eq!(driver.cuStreamQuery(blocking), NOT_READY);
    gate.open();
    ok(driver.cuStreamSynchronize(NULL_STREAM));
    ok(driver.cuStreamSynchronize(blocking));
    let gate = Gate::close(&driver, blocking);
    ok(driver.cuMemsetD8Async(memory, 3, BYTES, NULL_STREAM));
    assert_eq!(driver.cuStreamQuery(NULL_STREAM), NOT_READY);
    gate.open();
    ok(driver.cuStreamSynchronize(NULL_STREAM));
    assert_eq!(driver.contents(memory, BYTES), [3; BYTES]);
}

/// Who waits for the wrong stream comes too early; who has it wait for the right one does not.
#[test]
fn what_nobody_waits_for_is_late() {
    let name = "what_nobody_waits_for_is_late";
    let options = Options { late_us: 500_000, ..Options::default() };
    let Some(driver) = driver(name, &options) else { return };
    driver.context(0);
    let (first, second, event) = (driver.stream(), driver.stream(), driver.event());
    let (memory, seen) = (driver.holding(&[1; BYTES]), driver.pinned(BYTES, 0));
    let mut look = || {
        ok(driver.cuMemcpyDtoHAsync_v2(seen.as_mut_ptr().cast(), memory, BYTES, second));
        ok(driver.cuStreamSynchronize(second));
        seen[0]
    };
    ok(driver.cuMemsetD8Async(memory, 2, BYTES, first));
    ok(driver.cuEventRecord(event, first));
    assert_eq!(look(), 1);
    ok(driver.cuStreamWaitEvent(second, event, 0));
    assert_eq!(look(), 2);
    // in the end it happens by itself
    ok(driver.cuMemsetD8Async(memory, 3, BYTES, first));
    while driver.cuStreamQuery(first) == NOT_READY {
        std::thread::yield_now();
    }
    assert_eq!(look(), 3);
}

/// A destroyed stream still does what was queued.
#[test]
fn destroyed_streams_come_to_their_end() {
    let name = "destroyed_streams_come_to_their_end";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let (stream, memory) = (driver.stream(), driver.alloc(BYTES));
    let gate = Gate::close(&driver, stream);
    ok(driver.cuMemsetD8Async(memory, 9, BYTES, stream));
    ok(driver.cuStreamDestroy_v2(stream));
    gate.open();
    ok(driver.cuCtxSynchronize());
    assert_eq!(driver.contents(memory, BYTES), [9; BYTES]);
}

/// Parameters are those of the call, whatever becomes of the variables.
#[test]
fn a_launch_copies_its_parameters() {
    let name = "a_launch_copies_its_parameters";
    let Some(driver) = driver(name, &Options::default()) else { return };
    driver.context(0);
    let function = driver.kernel("scalars", c"nvfp4_linear");
    let (stream, memory) = (driver.stream(), driver.alloc(8));
    let gate = Gate::close(&driver, stream);
    ok(driver.launch_linear(function, stream, memory, memory + 4));
    gate.open();
    ok(driver.cuStreamSynchronize(stream));
    assert_eq!(driver.contents(memory, 8), LINEAR);
}

/// Whether operations of two streams ran at the same time, by the log.
fn overlaps(path: &std::path::Path, kinds: [&str; 2]) -> bool {
    let lines = log::read(path).unwrap();
    let of = |kind| log::operations(&lines).filter(move |o| o.kind == kind).map(|o| &o.ran_ns);
    of(kinds[0]).any(|a| of(kinds[1]).any(|b| a.start < b.end && b.start < a.end))
}

fn copy_and_launch(driver: &Driver, streams: [Handle; 2]) {
    let function = driver.kernel("scalars", c"nvfp4_linear");
    let (memory, other) = (driver.alloc(8), driver.alloc(BYTES));
    let pinned = driver.pinned(BYTES, 1);
    ok(driver.cuMemcpyHtoDAsync_v2(other, pinned.as_ptr().cast(), BYTES, streams[0]));
    ok(driver.launch_linear(function, streams[1], memory, memory + 4));
    ok(driver.cuCtxSynchronize());
}

#[test]
fn the_log_shows_that_streams_run_side_by_side() {
    let name = "the_log_shows_that_streams_run_side_by_side";
    let folder = std::env::temp_dir().join(format!("emulated-{}", std::process::id()));
    let options =
        Options { operation_us_min: 100_000, log: Some(folder.join("log")), ..Options::default() };
    if std::env::var_os("EMULATED_CUDA_CHILD").is_none() {
        std::fs::create_dir_all(&folder).unwrap();
    }
    let Some(driver) = driver(name, &options) else {
        if folder.join("log").exists() {
            assert!(overlaps(&folder.join("log"), ["htod", "kernel"]));
            let lines = log::read(&folder.join("log")).unwrap();
            assert_eq!(log::peak_bytes(&lines, 0), 8 + BYTES as u64);
            let kernel = log::operations(&lines).find(|o| o.kind == "kernel").unwrap();
            assert_eq!(
                (kernel.name.as_str(), kernel.context.as_str()),
                ("nvfp4_linear", "CUDA_SUCCESS")
            );
        }
        std::fs::remove_dir_all(&folder).unwrap();
        return;
    };
    driver.context(0);
    copy_and_launch(&driver, [driver.stream(), driver.stream()]);
}

/// Copies along a chain of streams, each of which waits for the one before it: the same bytes, whatever the delays.
#[test]
fn events_order_copies_whatever_the_delays() {
    let name = "events_order_copies_whatever_the_delays";
    for seed in 0..6 {
        let Some(driver) = driver(name, &Options { seed, ..Options::default() }) else { continue };
        driver.context(0);
        let streams = [(); 4].map(|()| driver.stream());
        let event = driver.event();
        let memory = [(); 4].map(|()| driver.alloc(BYTES));
        let (source, target) = (driver.pinned(BYTES, 0), driver.pinned(BYTES, 0));
        for round in 0..40u8 {
            source.fill(round);
            ok(driver.cuMemcpyHtoDAsync_v2(memory[0], source.as_ptr().cast(), BYTES, streams[0]));
            for i in 1..4 {
                ok(driver.cuEventRecord(event, streams[i - 1]));
                ok(driver.cuStreamWaitEvent(streams[i], event, 0));
                ok(driver.cuMemcpyDtoDAsync_v2(memory[i], memory[i - 1], BYTES, streams[i]));
            }
            ok(driver.cuMemcpyDtoHAsync_v2(
                target.as_mut_ptr().cast(),
                memory[3],
                BYTES,
                streams[3],
            ));
            ok(driver.cuStreamSynchronize(streams[3]));
            assert!(target.iter().all(|byte| *byte == round), "round {round}");
        }
        return;
    }
}
