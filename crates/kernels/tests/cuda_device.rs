//! The device layer and its kernels on a device, where there is one; without, each test says that it was ignored. On an
//! emulated driver, in processes of their own, all of them run anywhere.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says so by failing")]

mod twins;

use std::{
    env,
    io::Write as _,
    process::Command,
    ptr::{self, NonNull},
    sync::{Arc, Once},
    thread,
};

use cudarc::driver::sys;
use longshore_emulator::{Options, emulated, library_dir};
use longshore_kernels::{
    cuda::{
        driver::{CudaError, Device, DeviceMemory, Stream, probe},
        launch::{
            self, DevicePermutation, MlaWeight, Permutation, Permutations, Reorder, Workspace,
            expert_scalars, kv_scales, linear_scalars, mla_split, swizzle_into,
        },
        permute::Order,
        place::{PlaceSpan, Runs, SpanTable},
        scalars::{Experts, KvScales, Linear},
    },
    host::{
        kv,
        mla::{self, Dims, Weight},
        nvfp4,
        rows::permute_rows,
        swizzle,
    },
};
use longshore_models::{
    Dtype,
    transform::{Matrices, Reordering, RowOrder, SwizzleInto},
};
use twins::{
    CASTS, ExpertScalars, ROW_ORDERS, Random, assert_same, bytes_of, elements,
    expert_scalars_on_host, place_on_host, random_spans, reorder_on_host, scales,
};

/// Whether there has to be a real device: nothing is emulated, and none is a failure.
fn device_is_asked_for() -> bool {
    env::var_os("LONGSHORE_TEST_CUDA").is_some_and(|how| how == "device")
}

/// The first device, or `None`, said aloud once.
fn device() -> Option<Arc<Device>> {
    match probe() {
        Ok(_) => Some(Device::open(0).unwrap()),
        Err(error) => {
            assert!(!device_is_asked_for(), "a device is asked for: {error}");
            static SAID: Once = Once::new();
            // past the capture of passing tests' output
            let mut aloud = std::io::stderr();
            SAID.call_once(|| writeln!(aloud, "ignored: no CUDA device: {error}").unwrap());
            None
        }
    }
}

/// At once, with random delays, and as late as can be.
#[test]
fn all_of_it_works_on_an_emulated_driver() {
    const SELF: &str = "all_of_it_works_on_an_emulated_driver";
    if device_is_asked_for() {
        return;
    }
    let Some(library) = library_dir(env!("CARGO_TARGET_TMPDIR")) else { return };
    for (seed, late_us) in [(0, 0), (1, 0), (0, 50_000)] {
        let mut tests = Command::new(env::current_exe().unwrap());
        emulated(&mut tests, library, &Options { seed, late_us, ..Options::default() });
        let output = tests.args(["--skip", SELF, "--nocapture"]).output().unwrap();
        let said = [output.stdout, output.stderr].map(|s| String::from_utf8_lossy(&s).into_owned());
        let worked = output.status.success() && !said[1].contains("ignored");
        assert!(worked, "seed {seed}, late {late_us}: {}{}", said[0], said[1]);
    }
}

/// Device memory with these contents.
fn uploaded(stream: &Stream, contents: &[u8]) -> DeviceMemory {
    let memory = stream.device().allocate("a test", contents.len() as u64).unwrap();
    // SAFETY: both are there, and nobody else has them, until the stream is done.
    unsafe { stream.copy_to_device(memory.address(), contents.as_ptr(), memory.len()).unwrap() };
    stream.synchronize().unwrap();
    memory
}

/// What is in device memory when the stream is done.
fn downloaded(stream: &Stream, memory: &DeviceMemory) -> Vec<u8> {
    let mut contents = vec![0; memory.len() as usize];
    // SAFETY: both are there, and nobody else has them, until the stream is done.
    unsafe { stream.copy_to_host(contents.as_mut_ptr(), memory.address(), memory.len()).unwrap() };
    stream.synchronize().unwrap();
    contents
}

#[test]
fn a_device_is_opened_once_and_says_what_it_is() {
    let Some(first) = device() else { return };
    let again = thread::spawn(|| Device::open(0).unwrap()).join().unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    assert!(first.ordinal() == 0 && !first.name().is_empty() && first.uuid() != [0; 16]);
    assert!(first.geometry().multiprocessors > 0);
    let memory = first.memory().unwrap();
    assert!(memory.free <= memory.total && memory.total > 0);
    let found = probe().unwrap().devices;
    assert_eq!(Device::open(found).err(), Some(CudaError::NoDevice { ordinal: found, found }));
    assert!(Arc::ptr_eq(&first, &Device::with_uuid(first.uuid()).unwrap().unwrap()));
    assert!(Device::with_uuid([0xee; 16]).unwrap().is_none());
}

/// What is dropped last is dropped on a thread that has another context current, or none.
#[test]
fn destructors_leave_the_current_context_as_it_was() {
    fn current() -> sys::CUcontext {
        let mut current = ptr::null_mut();
        // SAFETY: `current` is ours, and there is a driver.
        unsafe { sys::cuCtxGetCurrent(&raw mut current).result().unwrap() };
        current
    }
    let Some(device) = device() else { return };
    let (memory, stream) = (device.allocate("a test", 1000).unwrap(), device.stream().unwrap());
    let event = device.event().unwrap();
    assert!(!current().is_null());
    thread::spawn(move || {
        assert!(current().is_null());
        drop((memory, stream, event));
        assert!(current().is_null());
    })
    .join()
    .unwrap();
}

#[test]
fn bytes_get_to_the_device_and_back() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut source = Random(1).bytes(3 << 20);
    let start = NonNull::new(source.as_mut_ptr()).unwrap();
    // SAFETY: unpinned before the vector goes.
    let pinned = unsafe { device.register(start, source.len()).unwrap() };
    assert!(pinned.device_address() != 0 && pinned.len() == source.len());
    let bytes = source.len() as u64;
    let [one, two] = [(); 2].map(|()| device.allocate("a test", bytes).unwrap());
    let mut back = vec![0; source.len()];
    // SAFETY: all of it is there until the stream is done, and nobody else has it.
    unsafe {
        stream.copy_to_device(one.address(), source.as_ptr(), bytes).unwrap();
        stream.copy_within(two.address(), one.address(), bytes).unwrap();
        stream.fill(two.address() + 5, 0xab, 1000).unwrap();
        stream.copy_to_host(back.as_mut_ptr(), two.address(), bytes).unwrap();
        // of nothing, addresses do not matter
        stream.copy_to_device(0, source.as_ptr(), 0).unwrap();
        stream.fill(0, 1, 0).unwrap();
    }
    let done = device.event().unwrap();
    stream.record(&done).unwrap();
    done.synchronize().unwrap();
    assert!(done.is_done().unwrap() && stream.is_idle().unwrap() && !stream.raw().is_null());
    drop(pinned);
    source[5..1005].fill(0xab);
    assert_same(&back, &source, "what came back");
}

/// Work of two streams and threads in the order that events give it.
#[test]
fn events_order_streams() {
    let Some(device) = device() else { return };
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let bytes = 8 << 20;
    let memory = device.allocate("a test", bytes).unwrap();
    let [begun, filled] = [(); 2].map(|()| device.timed_event().unwrap());
    first.record(&begun).unwrap();
    for value in 0..=9 {
        // SAFETY: the memory is there until both streams are done, and used in the order of the event.
        unsafe { first.fill(memory.address(), value, bytes).unwrap() };
    }
    first.record(&filled).unwrap();
    let contents = thread::scope(|scope| {
        let read = || {
            second.wait(&filled).unwrap();
            downloaded(&second, &memory)
        };
        scope.spawn(read).join().unwrap()
    });
    assert!(contents.iter().all(|byte| *byte == 9));
    assert!(filled.is_done().unwrap());
    assert!((0.0..60.0).contains(&filled.seconds_since(&begun).unwrap()));
}

/// All of it on the last device, which no other test allocates on when there are several.
#[test]
fn memory_is_counted_and_runs_out_as_an_error() {
    if device().is_none() {
        return;
    }
    let ordinal = probe().unwrap().devices - 1;
    let device = Device::open(ordinal).unwrap();
    let empty = device.allocate("nothing", 0).unwrap();
    assert!(empty.is_empty() && empty.address() == 0);
    let (one, two) = (device.allocate("a", 1000).unwrap(), device.allocate("b", 3000).unwrap());
    assert!(one.address() % 256 == 0 && two.address() % 256 == 0);
    assert!(one.ipc_handle().is_ok_and(|handle| handle != [0; 64]));
    assert!(device.allocated_bytes() >= 4000);
    drop(two);
    assert!(device.peak_bytes() >= 4000);
    let needed = device.memory().unwrap().total + (1 << 30);
    match device.allocate("too much", needed) {
        Err(CudaError::Memory { what: "too much", device, needed: all, free }) => {
            assert!(device == ordinal && all == needed && free < needed);
        }
        other => panic!("{other:?}"),
    }
}

/// Every reordering as a rank asks for it, with as much workspace as helps and as little as it takes.
#[test]
fn reorderings_equal_the_host() {
    let Some(device) = device() else { return };
    device.load_all().unwrap();
    let stream = device.stream().unwrap();
    let tables = Permutations::new(&device).unwrap();
    let mut random = Random(2);
    for (count, rows, row_bytes) in
        [(3, 128, 256), (2, 384, 128), (2, 1408, 1152), (1, 256, 4352), (1, 4096, 2048)]
    {
        let m = Matrices { param: 0, count, rows, row_bytes };
        let orders = ROW_ORDERS.into_iter().flat_map(|order| {
            [Reordering::Rows(order), Reordering::Blocks(order), Reordering::Swizzled(order)]
        });
        for how in orders.chain([Reordering::ScaleTiles, Reordering::WeightTiles]) {
            let reorder = Reorder::new(&m, how).unwrap();
            let source = random.bytes((count * rows * row_bytes) as usize);
            let mut want = source.clone();
            reorder_on_host(&mut want, &m, how);
            let needs = tables.workspace(&reorder).unwrap();
            for bytes in [needs.most, needs.least] {
                let workspace = device.allocate("a test", bytes).unwrap();
                let matrices = uploaded(&stream, &source);
                let (parts, address) = (Workspace::from(&workspace), matrices.address());
                // SAFETY: matrices, workspace and tables stay until the stream is done.
                unsafe { tables.reorder(&stream, &reorder, address, parts).unwrap() };
                let what = format!("{how:?} of {m:?} with {bytes} bytes");
                assert_same(&downloaded(&stream, &matrices), &want, &what);
            }
        }
    }
    assert!(tables.bytes() > 0);
}

/// No load asks for IL64; it is a kernel's order all the same.
#[test]
fn rows_are_interleaved_as_on_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (order, band, bands) = (Order::Interleaved64, 640, 3);
    for row_bytes in [16, 272, 2048] {
        let source = Random(6).bytes(band * bands * row_bytes);
        let mut want = source.clone();
        let on_host = |i| i / band * band + order.source(i % band, band);
        permute_rows(&mut want, row_bytes, band, on_host, &mut Vec::new());
        let permutation = Permutation::of_rows(order, band as u64, row_bytes as u64).unwrap();
        let permutation = DevicePermutation::upload(&stream, permutation.segments()).unwrap();
        let bands = bands as u64;
        let workspace = device.allocate("a test", permutation.workspace(bands).most).unwrap();
        let rows = uploaded(&stream, &source);
        // SAFETY: rows, workspace and table stay until the stream is done.
        unsafe { permutation.launch(&stream, rows.address(), bands, (&workspace).into()).unwrap() };
        assert_same(&downloaded(&stream, &rows), &want, &format!("rows of {row_bytes}"));
    }
}

#[test]
fn padded_scales_are_swizzled_as_on_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (count, rows, cols) = (3, 200, 37);
    let source = Random(3).bytes(count * rows * cols);
    let from = uploaded(&stream, &source);
    for order in ROW_ORDERS {
        let (padded_rows, padded_cols) = swizzle::padded(rows, cols);
        let mut want = vec![1; count * padded_rows * padded_cols];
        let targets = want.chunks_exact_mut(padded_rows * padded_cols);
        for (from, to) in source.chunks_exact(rows * cols).zip(targets) {
            let order = |m| Order::from(order).source(m, padded_rows);
            swizzle::swizzle(from, to, rows, cols, order);
        }
        let source =
            Matrices { param: 0, count: count as u64, rows: rows as u64, row_bytes: cols as u64 };
        let to = uploaded(&stream, &vec![1; want.len()]);
        let s = SwizzleInto { source, target: 1, order };
        // SAFETY: source and target stay until the stream is done.
        unsafe { swizzle_into(&stream, &s, from.address(), to.address()).unwrap() };
        assert_same(&downloaded(&stream, &to), &want, &format!("{s:?}"));
    }
}

#[test]
fn mla_splits_as_on_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(4);
    let dims = Dims { heads: 3, dn: 60, dv: 40, kl: 160 };
    let Dims { heads, dn, dv, kl } = dims;
    let (rows, elements) = (heads * (dn + dv), heads * (dn + dv) * kl);
    let data = random.bytes(elements * 4);
    let factors = random.bytes(rows.div_ceil(128) * kl.div_ceil(128) * 4);
    let exponents = random.bytes(elements / 32);
    let on_device = [&data, &factors, &exponents].map(|bytes| uploaded(&stream, bytes));
    let [data_at, factors_at, exponents_at] = on_device.each_ref().map(DeviceMemory::address);
    let plain = |bytes, dtype| {
        let host = Weight::Plain { data: &data[..elements * bytes], dtype };
        (host, MlaWeight::Plain { data: data_at, dtype })
    };
    for (host, weight) in [
        plain(2, Dtype::BF16),
        plain(2, Dtype::F16),
        plain(4, Dtype::F32),
        (
            Weight::Fp8 { data: &data[..elements], scale: &factors },
            MlaWeight::Fp8 { data: data_at, scale: factors_at },
        ),
        (
            Weight::Mxfp4 { data: &data[..elements / 2], scale: &exponents },
            MlaWeight::Mxfp4 { data: data_at, scale: exponents_at },
        ),
    ] {
        let (mut want_kc, mut want_vc) =
            (vec![0; heads * kl * dn * 2], vec![0; heads * dv * kl * 2]);
        mla::split(host, dims, &mut want_kc, &mut want_vc);
        let w_kc = uploaded(&stream, &vec![1; want_kc.len()]);
        let w_vc = uploaded(&stream, &vec![1; want_vc.len()]);
        // SAFETY: all of it stays until the stream is done.
        unsafe { mla_split(&stream, weight, dims, w_kc.address(), w_vc.address()).unwrap() };
        assert_same(&downloaded(&stream, &w_kc), &want_kc, &format!("w_kc, {weight:?}"));
        assert_same(&downloaded(&stream, &w_vc), &want_vc, &format!("w_vc, {weight:?}"));
    }
}

#[test]
fn scalars_equal_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (scales, inputs) = ([0.25, 0.75, f32::NAN], [3.0, 1e-40]);
    let memory = uploaded(&stream, &bytes_of(&[&scales[..], &inputs, &[0.0; 2]].concat()));
    let linear = Linear {
        scale_2: memory.address(),
        scale_2_count: 3,
        input_scale: memory.address() + 12,
        input_count: 2,
        alpha: memory.address() + 20,
        inverse_input: memory.address() + 24,
    };
    // SAFETY: the memory stays until the stream is done.
    unsafe { linear_scalars(&stream, &linear).unwrap() };
    let inverse = nvfp4::inverse(nvfp4::maximum(&inputs));
    let want = bytes_of(&[nvfp4::alpha(&inputs, &scales), inverse]);
    assert_same(&downloaded(&stream, &memory)[20..], &want, "scalars of a linear layer");
    for (k, v) in [(0.5, 0.25), (-1.0, -1.0), (0.5, -1.0), (0.0, 2.0)] {
        let memory = uploaded(&stream, &bytes_of(&[k, v, 0.0]));
        let address = memory.address();
        let kernel = KvScales { k: address, v: address + 4, v_given: 1, refused: address + 8 };
        // SAFETY: the memory stays until the stream is done.
        unsafe { kv_scales(&stream, &kernel).unwrap() };
        let settled = kv::settled(k, Some(v));
        let (want_k, want_v) = settled.unwrap_or((k, v));
        let refused = f32::from_bits(u32::from(settled.is_none()));
        let want = bytes_of(&[want_k, want_v, refused]);
        assert_same(&downloaded(&stream, &memory), &want, &format!("{k} {v}"));
    }
}

#[test]
fn scalars_of_many_layers_equal_the_host() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (device.stream().unwrap(), Random(7));
    for round in 0..40 {
        let (a, b) = (scales(&mut random, round % 4), scales(&mut random, 1 + round % 3));
        let memory = uploaded(&stream, &bytes_of(&[&[0.5; 2], &a[..], &b].concat()));
        let linear = Linear {
            scale_2: memory.address() + 8,
            scale_2_count: a.len() as u32,
            input_scale: memory.address() + 8 + 4 * a.len() as u64,
            input_count: b.len() as u32,
            alpha: memory.address(),
            inverse_input: memory.address() + 4,
        };
        // SAFETY: the memory stays until the stream is done.
        unsafe { linear_scalars(&stream, &linear).unwrap() };
        let want = [nvfp4::alpha(&b, &a), nvfp4::inverse(nvfp4::maximum(&b))];
        let got = &downloaded(&stream, &memory)[..8];
        assert_same(got, &bytes_of(&want), &format!("{a:?} {b:?}"));
    }
}

#[test]
fn scalars_of_experts_equal_the_host() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (device.stream().unwrap(), Random(8));
    for round in 0..24 {
        let ExpertScalars { kernel, inputs, want } = expert_scalars_on_host(&mut random, round);
        let sources = inputs.each_ref().map(|values| uploaded(&stream, &bytes_of(values)));
        let out = want.each_ref().map(|w| uploaded(&stream, &bytes_of(&vec![0.5; w.len()])));
        let [w13_scale_2, w2_scale_2, w13_input, w2_input] =
            sources.each_ref().map(DeviceMemory::address);
        let [g1_alphas, g2_alphas, w13_quant, w2_quant, g1_scale_c] =
            out.each_ref().map(DeviceMemory::address);
        let kernel = Experts {
            w13_scale_2,
            w2_scale_2,
            w13_input,
            w2_input,
            g1_alphas,
            g2_alphas,
            w13_quant,
            w2_quant,
            g1_scale_c,
            ..kernel
        };
        // SAFETY: the memory stays until the stream is done.
        unsafe { expert_scalars(&stream, &kernel).unwrap() };
        for (number, (out, want)) in out.iter().zip(&want).enumerate() {
            let what = format!("round {round}, result {number}");
            assert_same(&downloaded(&stream, out), &bytes_of(want), &what);
        }
    }
}

/// Places `runs`, whose targets are relative to the target's start, from a slab on the device, and compares all of the target.
fn check_placement(stream: &Stream, slab: &[u8], target_bytes: usize, runs: &[Runs], what: &str) {
    let mut want = vec![0x3c; target_bytes];
    let (source, target) = (uploaded(stream, slab), uploaded(stream, &want));
    let mut table = SpanTable::default();
    for runs in runs {
        let runs = Runs { target: runs.target + target.address(), ..*runs };
        place_on_host(slab, &mut want, target.address(), &runs);
        assert!(table.push(runs), "{what}: {runs:?}");
    }
    let bytes = size_of_val(table.spans());
    // SAFETY: spans have no padding; the slice ends before the table changes.
    let spans = unsafe { std::slice::from_raw_parts(table.spans().as_ptr().cast(), bytes) };
    let spans = uploaded(stream, spans);
    // SAFETY: slab, spans and target stay until the stream is done, and nobody else has them.
    unsafe { launch::place(stream, source.address(), spans.address(), &table).unwrap() };
    assert_same(&downloaded(stream, &target), &want, what);
}

#[test]
fn spans_of_all_kinds_are_placed_as_on_the_host() {
    let Some(device) = device() else { return };
    let (stream, mut random) = (device.stream().unwrap(), Random(9));
    let slab = random.bytes(1 << 20);
    for round in 0..24 {
        let (count, widest) = [(1, 300), (12, 3000), (300, 40), (3, 1 << 16)][round % 4];
        let (spans, bytes) = random_spans(&mut random, slab.len() as u64, count, widest);
        check_placement(&stream, &slab, bytes as usize, &spans, &format!("round {round}"));
    }
}

#[test]
fn placed_elements_are_converted_as_on_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for (from, to) in CASTS {
        let all = elements(from);
        let (size, to_size) = (from.bitsize() as u64 / 8, to.bitsize() as u64 / 8);
        let count = all.len() as u64 / size;
        // all at once, and as runs of 5 elements, two elements apart
        let whole = Runs {
            source_offset: 0,
            target: 0,
            rows: 1,
            width: count * size,
            source_stride: 0,
            target_stride: 0,
            cast: Some((from, to)),
        };
        let strided = Runs {
            rows: count / 7,
            width: 5 * size,
            source_stride: 7 * size,
            target_stride: 6 * to_size,
            ..whole
        };
        for runs in [whole, strided] {
            let bytes = (count * to_size) as usize;
            check_placement(&stream, &all, bytes, &[runs], &format!("{from} → {to}"));
        }
    }
}

/// From pinned host memory: the kernel reads a slab where it is.
#[test]
fn spans_are_placed_from_host_memory() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (mut random, bytes) = (Random(5), 1 << 20);
    let mut memory = random.bytes(bytes + 4096);
    // whole pages, as slabs are
    let lead = memory.as_ptr().align_offset(4096);
    let slab = &mut memory[lead..][..bytes];
    let start = NonNull::new(slab.as_mut_ptr()).unwrap();
    // SAFETY: unpinned before the vector goes.
    let pinned = unsafe { device.register(start, bytes).unwrap() };
    let target = uploaded(&stream, &vec![0x3c; bytes]);
    let mut table = SpanTable::default();
    let mut want = vec![0x3c; bytes];
    for number in 0..64 {
        let (source, width) = (random.below(7000) as usize, random.below(7000) as usize);
        let (at, stride) = (16_000 * number + random.below(2000) as usize, 7000);
        for row in 0..2 {
            let run = &slab[source + row * 90_000..][..width];
            want[at + row * stride..][..width].copy_from_slice(run);
        }
        assert!(table.push(Runs {
            source_offset: source as u64,
            target: target.address() + at as u64,
            rows: 2,
            width: width as u64,
            source_stride: 90_000,
            target_stride: stride as u64,
            cast: None,
        }));
    }
    let spans: &[PlaceSpan] = table.spans();
    let on_device = device.allocate("a test", size_of_val(spans) as u64).unwrap();
    // SAFETY: slab, spans and target stay until the stream is done, and nobody else has them.
    unsafe {
        stream.copy_to_device(on_device.address(), spans.as_ptr().cast(), on_device.len()).unwrap();
        launch::place(&stream, pinned.device_address(), on_device.address(), &table).unwrap();
    }
    assert_same(&downloaded(&stream, &target), &want, "placed spans");
}

/// A refusal comes before the driver, which would take the context down with it.
#[test]
fn a_misaligned_launch_is_an_error_and_the_device_works_on() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let tables = Permutations::new(&device).unwrap();
    let m = Matrices { param: 0, count: 1, rows: 128, row_bytes: 128 };
    let reorder = Reorder::new(&m, Reordering::Swizzled(RowOrder::Shuffled32)).unwrap();
    let memory = uploaded(&stream, &[7; 128 * 128 + 8]);
    // SAFETY: nothing is launched.
    let outcome =
        unsafe { tables.reorder(&stream, &reorder, memory.address() + 8, Workspace::default()) };
    assert!(matches!(outcome, Err(CudaError::Launch { .. })), "{outcome:?}");
    assert!(downloaded(&stream, &memory).iter().all(|byte| *byte == 7));
}
