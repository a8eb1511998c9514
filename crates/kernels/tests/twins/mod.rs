//! What kernels are compared with: random bytes, and what the host makes of them.

use longshore_kernels::{
    cuda::{permute::Order, place::Runs, scalars::Experts},
    host::{blocks::into_blocks, cast::cast, nvfp4, rows::permute_rows, shuffle, swizzle},
};
use longshore_models::{
    Dtype,
    transform::{Matrices, Reordering, RowOrder},
};

/// A generator of numbers, the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 33) % end
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 40) as u8).collect()
    }
}

pub(crate) fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(at) = (0..got.len()).find(|i| got[*i] != want[*i]) {
        panic!("{what}: byte {at} of {} is {:#x}, not {:#x}", got.len(), got[at], want[at]);
    }
}

/// What a rank does to the matrices of a parameter on the host.
pub(crate) fn reorder_on_host(bytes: &mut [u8], m: &Matrices, how: Reordering) {
    let (rows, row_bytes) = (m.rows as usize, m.row_bytes as usize);
    let workspace = &mut Vec::new();
    for matrix in bytes.chunks_exact_mut((rows * row_bytes).max(1)) {
        let by = |order: RowOrder| move |i| Order::from(order).source(i, rows);
        let band = |order: RowOrder, least| order.band(m.rows, least) as usize;
        match how {
            // of whole bands of 32 rows only, where there is something to do
            Reordering::Rows(RowOrder::AsStored) => {}
            Reordering::Rows(order) => {
                permute_rows(matrix, row_bytes, band(order, 32), by(order), workspace);
            }
            Reordering::Blocks(order) => {
                into_blocks(matrix, rows, row_bytes, by(order), workspace);
            }
            Reordering::Swizzled(order) => {
                let band = band(order, 128);
                swizzle::swizzle_in_place(matrix, rows, row_bytes, by(order), band, workspace);
            }
            Reordering::ScaleTiles => shuffle::shuffle_scales(matrix, rows, row_bytes, workspace),
            Reordering::WeightTiles => shuffle::shuffle_weights(matrix, rows, row_bytes, workspace),
        }
    }
}

pub(crate) const ROW_ORDERS: [RowOrder; 3] =
    [RowOrder::AsStored, RowOrder::Shuffled32, RowOrder::GatedShuffled32];

// ---- placement -------------------------------------------------------------------------------------------------------

/// What the spans do on the host.
pub(crate) fn place_on_host(slab: &[u8], target: &mut [u8], base: u64, runs: &Runs) {
    for row in 0..runs.rows {
        let from = (runs.source_offset + row * runs.source_stride) as usize;
        let to = (runs.target - base + row * runs.target_stride) as usize;
        let source = &slab[from..][..runs.width as usize];
        match runs.cast {
            None => target[to..][..source.len()].copy_from_slice(source),
            Some((from, to_dtype)) => {
                let size = |dtype: Dtype| dtype.bitsize() / 8;
                let bytes = source.len() / size(from) * size(to_dtype);
                assert!(cast(source, from, &mut target[to..][..bytes], to_dtype));
            }
        }
    }
}

/// Spans of all shapes and alignments, side by side in one target with gaps of their own.
pub(crate) fn random_spans(
    random: &mut Random,
    slab_bytes: u64,
    count: usize,
    widest: u64,
) -> (Vec<Runs>, u64) {
    let (mut spans, mut end) = (Vec::new(), 0u64);
    for _ in 0..count {
        let grain = [1, 2, 4, 8, 16, 64][random.below(6) as usize];
        let width = random.below(widest) / grain * grain;
        let rows = if random.below(3) == 0 { 1 } else { random.below(40) };
        let source_stride = width + random.below(5) * grain;
        let target_stride = width + random.below(3) * grain;
        let source_bytes = source_stride * rows.max(1) + width;
        if source_bytes > slab_bytes {
            continue;
        }
        let source_offset = random.below(slab_bytes - source_bytes + 1) / grain * grain;
        let target = (end + random.below(4)).next_multiple_of(grain);
        end = target + target_stride * rows.max(1);
        let cast = None;
        spans.push(Runs { source_offset, target, rows, width, source_stride, target_stride, cast });
    }
    (spans, end)
}

/// The conversions that placement knows.
pub(crate) const CASTS: [(Dtype, Dtype); 10] = [
    (Dtype::BF16, Dtype::F16),
    (Dtype::BF16, Dtype::F32),
    (Dtype::F16, Dtype::BF16),
    (Dtype::F16, Dtype::F32),
    (Dtype::F32, Dtype::BF16),
    (Dtype::F32, Dtype::F16),
    (Dtype::F64, Dtype::BF16),
    (Dtype::F64, Dtype::F16),
    (Dtype::F64, Dtype::F32),
    (Dtype::I32, Dtype::I64),
];

/// All halves, floats and doubles of all exponents with what decides a rounding below them, NaNs included.
pub(crate) fn elements(dtype: Dtype) -> Vec<u8> {
    let lows = [0u64, 1, 0xfff, 0x1000, 0x1001, 0x2000, 0x7fff, 0x8000, 0x8001, 0xffff];
    let highs = || (0..=0xffffu64).step_by(3).chain(0x7f7e..0x7fc2).chain(0xff7e..0xffc2);
    let with_lows = |shift: u32| {
        let near = move |high: u64| lows.map(|low| high << 48 | low << shift | (low & 1));
        highs().flat_map(near).collect::<Vec<u64>>()
    };
    match dtype {
        Dtype::BF16 | Dtype::F16 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        Dtype::F32 | Dtype::I32 => {
            let all = highs().flat_map(|high| lows.map(|low| (high << 16 | low) as u32));
            all.flat_map(u32::to_le_bytes).collect()
        }
        _ => {
            let mut random = Random(3);
            // where F32 and the halves round: bits 29 and up; and exponents within their ranges
            let mut all = with_lows(29);
            all.extend(with_lows(16));
            all.extend((0..100_000).map(|_| {
                let (sign, exponent) = (random.below(2) << 63, 1023 - 160 + random.below(300));
                sign | exponent << 52 | random.next() >> 12
            }));
            all.into_iter().flat_map(u64::to_le_bytes).collect()
        }
    }
}

// ---- scalars ---------------------------------------------------------------------------------------------------------

/// Scales as they are stored, and now and then what no sound checkpoint has.
pub(crate) fn scales(random: &mut Random, count: usize) -> Vec<f32> {
    let odd = [f32::NAN, -f32::NAN, 0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, -3.0];
    let value = |_| match random.below(12) as usize {
        i if i < odd.len() => odd[i],
        _ => f32::from_bits((random.next() >> 32) as u32),
    };
    (0..count).map(value).collect()
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The scalars of the experts of one rank.
pub(crate) struct ExpertScalars {
    /// Without addresses.
    pub(crate) kernel: Experts,
    /// `w13_scale_2`, `w2_scale_2`, `w13_input`, `w2_input`.
    pub(crate) inputs: [Vec<f32>; 4],
    /// `g1_alphas`, `g2_alphas`, `w13_quant`, `w2_quant`, `g1_scale_c`.
    pub(crate) want: [Vec<f32>; 5],
}

/// Of an expert group that `round` chooses, with a fused expert or without, maxima for each expert or for all.
pub(crate) fn expert_scalars_on_host(random: &mut Random, round: usize) -> ExpertScalars {
    let (per_expert, fused) = (round % 2 == 0, round % 3 == 0);
    let (per_group, routed, group) = (5usize, 20, round % 4);
    let slots = per_group + usize::from(fused);
    let experts = routed + usize::from(fused);
    let inputs = [2 * slots, slots, 2 * experts, experts].map(|n| scales(random, n));
    let [w13_2, w2_2, w13_in, w2_in] = &inputs;
    let expert =
        |slot| if slot < per_group { group * per_group + slot } else { routed + slot - per_group };
    let a = |slot: usize| match per_expert {
        true => (nvfp4::maximum(&w13_in[2 * expert(slot)..][..2]), w2_in[expert(slot)]),
        false => (nvfp4::maximum(w13_in), nvfp4::maximum(w2_in)),
    };
    let per_slot = |value: &dyn Fn(usize) -> f32| (0..slots).map(value).collect::<Vec<f32>>();
    let g1 = per_slot(&|slot| nvfp4::product(a(slot).0, w13_2[2 * slot]));
    let quants = if per_expert { slots } else { 1 };
    let want = [
        g1.clone(),
        per_slot(&|slot| nvfp4::product(a(slot).1, w2_2[slot])),
        per_slot(&|slot| nvfp4::inverse(a(slot).0))[..quants].to_vec(),
        per_slot(&|slot| nvfp4::inverse(a(slot).1))[..quants].to_vec(),
        per_slot(&|slot| nvfp4::product(nvfp4::inverse(a(slot).1), g1[slot])),
    ];
    let kernel = Experts {
        slots: slots as u32,
        experts: experts as u32,
        first_expert: (group * per_group) as u32,
        per_group: per_group as u32,
        routed: routed as u32,
        per_expert: u32::from(per_expert),
        quants: quants as u32,
        ..Experts::default()
    };
    ExpertScalars { kernel, inputs, want }
}
