//! Bytes per second of the host kernels on one thread, beside a plain copy of as many bytes.
//!
//! ```text
//! cargo bench -p longshore-kernels [-- PATTERN]     rows whose kernel or shape contains PATTERN
//! ```
//!
//! A kernel and its copy take turns on the same memory (huge pages, as a rank's parameters), and the best of each counts:
//! compare within a row. Bytes are what is read plus what is written, halved, so that a copy and a kernel that keeps
//! sizes count their matrix once. One expert's matrices may fit into a cache; `N × [rows, bytes]` are as many experts as
//! exceed the last-level cache.
//!
//! A plain `main`, not a harness: the harnesses at hand measure one function after the other, and on a shared machine a
//! copy measured a minute later says nothing. Without `--bench` (as under `cargo test --all-targets`) every row runs once.

#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

use std::{
    env, fs,
    hint::black_box,
    time::{Duration, Instant},
};

use longshore_kernels::host::{
    blocks::into_blocks,
    cast::cast,
    mla::{self, Dims, Weight},
    permute::{gated_shuffled32, interleaved64, shuffled32},
    rows::permute_rows,
    shuffle::{shuffle_scales, shuffle_weights},
    swizzle::{swizzle, swizzle_in_place},
};
use longshore_models::Dtype;

/// Least time that a row is measured, in rounds of one copy and one kernel.
const ROW_TIME: Duration = Duration::from_millis(400);
/// Least rounds of a row.
const ROUNDS_MIN: usize = 5;
/// Bytes that one turn moves at least, so that the clock's grain does not matter.
const TURN_BYTES: usize = 8 << 20;

/// Size of a huge page on x86-64 and (with 4 KiB base pages) aarch64.
const HUGE_PAGE: usize = 2 << 20;

/// A shape `[rows, bytes of a row]` of one expert or one layer on one rank.
type Shape = (usize, usize);

/// DeepSeek-V3 in NVFP4, experts whole (EP): w13 `[2·2048, 7168/2]`, w2 `[7168, 2048/2]`.
const W13: Shape = (4096, 3584);
const W2: Shape = (7168, 1024);
/// Their scales, one byte for 16 elements.
const W13_SCALE: Shape = (4096, 448);
const W2_SCALE: Shape = (7168, 128);
/// gate_up of a dense layer, DeepSeek-V3, tp 8: `[2·18432/8, 7168/2]` and its scale.
const DENSE: Shape = (4608, 3584);
const DENSE_SCALE: Shape = (4608, 448);

/// Scales of the same experts in MXFP4, one byte for 32 elements.
const W13_E8M0: Shape = (4096, 224);
const W2_E8M0: Shape = (7168, 64);
/// The same experts in BF16.
const W13_BF16: Shape = (4096, 14336);
const W2_BF16: Shape = (7168, 4096);

fn main() {
    let mut bench = Bench::new();
    println!("| kernel | shape | GB/s | copy, GB/s | ratio |\n|---|---|---|---|---|");
    bench.rows();
    bench.swizzles();
    bench.shuffles();
    bench.splits();
    bench.casts();
}

/// What is asked for, and the memory that everything runs on.
struct Bench {
    pattern: String,
    once: bool,
    large_bytes: usize,
    arenas: Arenas,
}

/// As large as the largest row so far needs.
#[derive(Default)]
struct Arenas {
    source: Vec<u8>,
    target: Vec<u8>,
    workspace: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let args: Vec<String> = env::args().skip(1).collect();
        let once = !args.iter().any(|a| a == "--bench");
        let pattern = args.into_iter().find(|a| !a.starts_with('-')).unwrap_or_default();
        let large_bytes = if once { 0 } else { last_level_cache() * 5 / 4 };
        Self { pattern, once, large_bytes, arenas: Arenas::default() }
    }

    /// Row permutations in place: the halves of w13 interleaved or not.
    fn rows(&mut self) {
        for shape in [W2, W2_SCALE, DENSE] {
            self.in_place("rows SHUF32", shape, |matrix, workspace| {
                permute_rows(matrix, shape.1, 32, shuffled32, workspace);
            });
        }
        for shape @ (rows, cols) in [W13, W13_SCALE] {
            self.in_place("rows W31PERM", shape, |matrix, workspace| {
                permute_rows(matrix, cols, rows, |i| gated_shuffled32(i, rows), workspace);
            });
        }
        let (rows, cols) = W13;
        self.in_place("rows IL64", W13, |matrix, workspace| {
            permute_rows(matrix, cols, rows, |i| interleaved64(i, rows), workspace);
        });
    }

    /// Block scales: out of place, and in place with each order.
    fn swizzles(&mut self) {
        for shape @ (rows, cols) in [W13_SCALE, W2_SCALE, DENSE_SCALE] {
            self.out_of_place("swizzle", shape, |source, target| {
                swizzle(source, target, rows, cols, |m| m);
            });
        }
        for shape @ (rows, cols) in [W2_SCALE, DENSE_SCALE] {
            self.in_place("swizzle in place", shape, |matrix, workspace| {
                swizzle_in_place(matrix, rows, cols, |m| m, 128, workspace);
            });
            self.in_place("swizzle in place, SHUF32", shape, |matrix, workspace| {
                swizzle_in_place(matrix, rows, cols, shuffled32, 128, workspace);
            });
        }
        let (rows, cols) = W13_SCALE;
        self.in_place("swizzle in place, W31PERM", W13_SCALE, |matrix, workspace| {
            let order = |m| gated_shuffled32(m, rows);
            swizzle_in_place(matrix, rows, cols, order, rows, workspace);
        });
        self.in_place("swizzle in place, IL64", W13_SCALE, |matrix, workspace| {
            let order = |m| interleaved64(m, rows);
            swizzle_in_place(matrix, rows, cols, order, rows, workspace);
        });
    }

    /// AITER's shuffles and the column blocks of BF16 experts.
    fn shuffles(&mut self) {
        for shape @ (rows, cols) in [W13_E8M0, W2_E8M0] {
            self.in_place("E8M0 scale shuffle", shape, |matrix, workspace| {
                shuffle_scales(matrix, rows, cols, workspace);
            });
        }
        for shape @ (rows, cols) in [W13, W2] {
            self.in_place("16×16 weight shuffle", shape, |matrix, workspace| {
                shuffle_weights(matrix, rows, cols, workspace);
            });
        }
        let (rows, cols) = W13_BF16;
        self.in_place("BLK, W31PERM", W13_BF16, |matrix, workspace| {
            into_blocks(matrix, rows, cols, |i| gated_shuffled32(i, rows), workspace);
        });
        let (rows, cols) = W2_BF16;
        self.in_place("BLK, SHUF32", W2_BF16, |matrix, workspace| {
            into_blocks(matrix, rows, cols, shuffled32, workspace);
        });
    }

    /// `kv_b_proj` as DeepSeek-V3 (tp 8) and GLM-5 (tp 8) store it.
    fn splits(&mut self) {
        let deepseek = Dims { heads: 16, dn: 128, dv: 128, kl: 512 };
        let glm = Dims { heads: 8, dn: 192, dv: 256, kl: 512 };
        for (dims, name) in [(deepseek, "DeepSeek-V3"), (glm, "GLM-5")] {
            let rows = dims.heads * (dims.dn + dims.dv);
            let elements = rows * dims.kl;
            let factors = 1.5f32.to_le_bytes().repeat(rows.div_ceil(128) * dims.kl.div_ceil(128));
            let exponents: Vec<u8> = (0..elements / 32).map(|i| 120 + (i % 16) as u8).collect();
            let shape = format!("{name} [{rows}, {}]", dims.kl);
            let schemes = [("BF16", elements * 2), ("FP8", elements), ("MXFP4", elements / 2)];
            for (scheme, bytes) in schemes {
                let kernel = format!("MLA split, {scheme}");
                self.measure(&kernel, &shape, [bytes, elements * 2], |arenas| {
                    let data = &arenas.source[..bytes];
                    let weight = match scheme {
                        "BF16" => Weight::Plain { data, dtype: Dtype::BF16 },
                        "FP8" => Weight::Fp8 { data, scale: &factors },
                        _ => Weight::Mxfp4 { data, scale: &exponents },
                    };
                    let target = &mut arenas.target[..elements * 2];
                    let (w_kc, w_vc) = target.split_at_mut(dims.heads * dims.dn * dims.kl * 2);
                    mla::split(weight, dims, w_kc, w_vc);
                });
            }
        }
    }

    /// Casts of a matrix of 8 Mi elements.
    fn casts(&mut self) {
        use Dtype::{BF16, F16, F32};
        let (rows, cols) = (2048, 4096);
        let pairs = [(F32, BF16), (F16, BF16), (BF16, F32), (F16, F32), (F32, F16), (BF16, F16)];
        for (from, to) in pairs {
            let [read, written] = [from, to].map(|d| rows * cols * if d == F32 { 4 } else { 2 });
            let (kernel, shape) = (format!("cast {from} → {to}"), format!("[{rows}, {cols}]"));
            self.measure(&kernel, &shape, [read, written], |arenas| {
                let target = &mut arenas.target[..written];
                assert!(cast(&arenas.source[..read], from, target, to), "a known pair");
            });
        }
    }

    fn in_place(&mut self, kernel: &str, shape: Shape, run: impl Fn(&mut [u8], &mut Vec<u8>)) {
        self.each_count(kernel, shape, |arenas, count, bytes| {
            for matrix in arenas.source[..count * bytes].chunks_exact_mut(bytes) {
                run(matrix, &mut arenas.workspace);
            }
        });
    }

    fn out_of_place(&mut self, kernel: &str, shape: Shape, run: impl Fn(&[u8], &mut [u8])) {
        self.each_count(kernel, shape, |arenas, count, bytes| {
            let sources = arenas.source[..count * bytes].chunks_exact(bytes);
            for (source, target) in sources.zip(arenas.target.chunks_exact_mut(bytes)) {
                run(source, target);
            }
        });
    }

    /// One matrix, and as many as exceed the last-level cache.
    fn each_count(&mut self, kernel: &str, shape: Shape, run: impl Fn(&mut Arenas, usize, usize)) {
        let bytes = shape.0 * shape.1;
        let matrix = format!("[{}, {}]", shape.0, shape.1);
        self.measure(kernel, &matrix, [bytes; 2], |arenas| run(arenas, 1, bytes));
        let count = self.large_bytes.div_ceil(bytes);
        if count > 1 {
            let shape = format!("{count} × {matrix}");
            self.measure(kernel, &shape, [count * bytes; 2], |arenas| run(arenas, count, bytes));
        }
    }

    /// Prints one row of the table for a kernel that reads and writes so many bytes.
    fn measure(
        &mut self,
        kernel: &str,
        shape: &str,
        [read, written]: [usize; 2],
        run: impl Fn(&mut Arenas),
    ) {
        if !format!("{kernel} {shape}").contains(&self.pattern) {
            return;
        }
        let bytes = (read + written) / 2;
        self.arenas.grow(bytes.max(read), bytes.max(written));
        let turns = if self.once { 1 } else { TURN_BYTES.div_ceil(bytes) };
        let (mut best_copy, mut best) = (f64::INFINITY, f64::INFINITY);
        let start = Instant::now();
        for round in 0.. {
            let enough = round >= ROUNDS_MIN && start.elapsed() >= ROW_TIME;
            if enough || self.once && round > 0 {
                break;
            }
            let Arenas { source, target, .. } = &mut self.arenas;
            best_copy = best_copy.min(seconds(turns, || {
                target[..bytes].copy_from_slice(&source[..bytes]);
                black_box(&mut *target);
            }));
            best = best.min(seconds(turns, || {
                run(&mut self.arenas);
                black_box(&mut self.arenas);
            }));
        }
        let [rate, copy_rate] = [best, best_copy].map(|seconds| bytes as f64 / seconds / 1e9);
        let ratio = rate / copy_rate;
        println!("| {kernel} | {shape} | {rate:.1} | {copy_rate:.1} | {ratio:.2} |");
    }
}

impl Arenas {
    fn grow(&mut self, source: usize, target: usize) {
        for (arena, bytes) in [(&mut self.source, source), (&mut self.target, target)] {
            if arena.len() < bytes {
                // one after the other, so that no more is held than is needed
                *arena = Vec::new();
                *arena = memory(bytes);
            }
        }
    }
}

/// Seconds of one of `turns` runs.
fn seconds(turns: usize, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..turns {
        run();
    }
    start.elapsed().as_secs_f64() / turns as f64
}

/// Pseudo-random bytes on huge pages, where the system has them.
fn memory(bytes: usize) -> Vec<u8> {
    let mut memory = Vec::with_capacity(bytes);
    let start: *mut u8 = memory.as_mut_ptr();
    let skip = start.align_offset(HUGE_PAGE).min(bytes);
    // SAFETY: `start + skip` to `start + bytes` is within the vector's allocation. Advice only: an error changes nothing.
    unsafe { libc::madvise(start.add(skip).cast(), bytes - skip, libc::MADV_HUGEPAGE) };
    memory.resize(bytes, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in memory.as_chunks_mut::<8>().0 {
        // xorshift64: every code occurs, in no order
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    memory
}

/// Bytes of the last-level cache, or 64 MiB where the system does not tell.
fn last_level_cache() -> usize {
    (0..8)
        .filter_map(|i| {
            fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok()
        })
        .filter_map(|size| size.trim().strip_suffix('K')?.parse::<usize>().ok())
        .max()
        .map_or(64 << 20, |kib| kib << 10)
}
