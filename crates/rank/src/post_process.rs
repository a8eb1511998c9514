//! Post-processing: runs a finish on the complete parameters of one rank.

pub mod device;

use longshore_kernels::host::{
    blocks, kv, mla, nvfp4,
    permute::{gated_shuffled32, shuffled32},
    rows::permute_rows,
    shuffle, swizzle,
};
use longshore_models::{
    declare::ParamId,
    quant::Scheme,
    transform::{
        ExpertScalars, Finish, KvScales, LinearScalars, Matrices, MlaSplit, Reordering, RowOrder,
        SwizzleInto,
    },
};

use crate::{error::RankError, params::ParamMemory};

/// Runs `finish` on the parameters of `rank`. `workspace` is reused from call to call; it grows to 128 rows (RNK-6).
///
/// # Safety
/// The finish's inputs are complete, and nothing else reads or writes its inputs and outputs meanwhile (the rank's
/// state machine runs each finish once, when its inputs have landed).
///
/// # Errors
/// A scheme that this transform does not know, or values that contradict each other.
pub(crate) unsafe fn run(
    finish: &Finish,
    rank: u32,
    memory: &ParamMemory,
    workspace: &mut Vec<u8>,
) -> Result<(), RankError> {
    match finish {
        // SAFETY: passed on from the caller.
        Finish::MlaSplit(split) => unsafe { mla_split(split, memory) },
        // SAFETY: passed on from the caller.
        Finish::KvScales(scales) => unsafe { kv_scales(scales, memory) },
        Finish::Reorder(matrices, how) => {
            // SAFETY: passed on from the caller.
            unsafe { reorder(matrices, *how, memory, workspace) };
            Ok(())
        }
        Finish::SwizzleInto(swizzle) => {
            // SAFETY: passed on from the caller.
            unsafe { swizzle_into(swizzle, memory) };
            Ok(())
        }
        Finish::LinearScalars(scalars) => {
            // SAFETY: passed on from the caller.
            unsafe { linear_scalars(scalars, memory) };
            Ok(())
        }
        Finish::ExpertScalars(scalars) => {
            // SAFETY: passed on from the caller.
            unsafe { expert_scalars(scalars, rank, memory) };
            Ok(())
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn mla_split(split: &MlaSplit, memory: &ParamMemory) -> Result<(), RankError> {
    let param = &memory.placement().params[split.weight as usize];
    // SAFETY: inputs are complete and outputs untouched by anyone else, says the caller; inputs and outputs are
    // different parameters.
    let (data, scale, w_kc, w_vc) = unsafe {
        (
            memory.bytes(split.weight),
            split.scale.map(|s| memory.bytes(s)),
            memory.bytes_mut(split.w_kc),
            memory.bytes_mut(split.w_vc),
        )
    };
    let weight = match (split.scheme, scale) {
        (Scheme::Bf16, _) => mla::Weight::Plain { data, dtype: param.dtype },
        (Scheme::Fp8, Some(scale)) => mla::Weight::Fp8 { data, scale },
        (Scheme::Mxfp4, Some(scale)) => mla::Weight::Mxfp4 { data, scale },
        (scheme, _) => {
            let what = format!("no MLA split of {}", scheme.name());
            return Err(RankError::Transform { param: param.name.clone(), what });
        }
    };
    let dims = mla::Dims {
        heads: split.heads as usize,
        dn: split.dn as usize,
        dv: split.dv as usize,
        kl: split.kl as usize,
    };
    mla::split(weight, dims, w_kc, w_vc);
    Ok(())
}

/// Which source row becomes row `i` of a matrix of `rows` rows.
fn row_order(order: RowOrder, rows: usize) -> impl Fn(usize) -> usize {
    move |i| match order {
        RowOrder::AsStored => i,
        RowOrder::Shuffled32 => shuffled32(i),
        RowOrder::GatedShuffled32 => gated_shuffled32(i, rows),
    }
}

/// # Safety
/// As [`run`].
unsafe fn reorder(m: &Matrices, how: Reordering, memory: &ParamMemory, workspace: &mut Vec<u8>) {
    let (rows, row_bytes) = (m.rows as usize, m.row_bytes as usize);
    // SAFETY: the caller promises exclusive access.
    let bytes = unsafe { memory.bytes_mut(m.param) };
    for matrix in bytes.chunks_exact_mut((rows * row_bytes).max(1)).take(m.count as usize) {
        match how {
            Reordering::Rows(order) => {
                let band = order.band(m.rows, 32) as usize;
                permute_rows(matrix, row_bytes, band, row_order(order, rows), workspace);
            }
            Reordering::Blocks(order) => {
                blocks::into_blocks(matrix, rows, row_bytes, row_order(order, rows), workspace);
            }
            Reordering::Swizzled(order) => {
                let band = order.band(m.rows, swizzle::BLOCK_ROWS as u64) as usize;
                let order = row_order(order, rows);
                swizzle::swizzle_in_place(matrix, rows, row_bytes, order, band, workspace);
            }
            Reordering::ScaleTiles => shuffle::shuffle_scales(matrix, rows, row_bytes, workspace),
            Reordering::WeightTiles => shuffle::shuffle_weights(matrix, rows, row_bytes, workspace),
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn swizzle_into(s: &SwizzleInto, memory: &ParamMemory) {
    let (rows, cols) = (s.source.rows as usize, s.source.row_bytes as usize);
    // SAFETY: the source is complete, the target untouched by anyone else, says the caller; they are different
    // parameters.
    let (source, target) = unsafe { (memory.bytes(s.source.param), memory.bytes_mut(s.target)) };
    let (padded_rows, padded_cols) = swizzle::padded(rows, cols);
    let sources = source.chunks_exact((rows * cols).max(1));
    let targets = target.chunks_exact_mut((padded_rows * padded_cols).max(1));
    for (source, target) in sources.zip(targets) {
        swizzle::swizzle(source, target, rows, cols, row_order(s.order, padded_rows));
    }
}

/// The F32 elements of a complete parameter.
///
/// # Safety
/// As [`ParamMemory::bytes`].
unsafe fn floats(memory: &ParamMemory, param: ParamId) -> Vec<f32> {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { memory.bytes(param) };
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// # Safety
/// As [`ParamMemory::bytes_mut`].
unsafe fn store(memory: &ParamMemory, param: ParamId, values: &[f32]) {
    // SAFETY: passed on from the caller.
    let bytes = unsafe { memory.bytes_mut(param) };
    for (target, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *target = value.to_le_bytes();
    }
}

/// # Safety
/// As [`run`].
unsafe fn linear_scalars(s: &LinearScalars, memory: &ParamMemory) {
    // SAFETY: inputs are complete, says the caller.
    let (scale_2, input) = unsafe { (floats(memory, s.scale_2), floats(memory, s.input_scale)) };
    let inverse = nvfp4::inverse(nvfp4::maximum(&input));
    // SAFETY: nobody else touches the outputs, says the caller.
    unsafe {
        store(memory, s.alpha, &[nvfp4::alpha(&input, &scale_2)]);
        store(memory, s.inverse, &[inverse]);
    }
}

/// # Safety
/// As [`run`].
unsafe fn expert_scalars(s: &ExpertScalars, rank: u32, memory: &ParamMemory) {
    // SAFETY: inputs are complete, says the caller.
    let [w13_scale_2, w2_scale_2, w13_input, w2_input] = unsafe {
        [s.w13_scale_2, s.w2_scale_2, s.w13_input, s.w2_input].map(|p| floats(memory, p))
    };
    let group = u64::from(memory.placement().parallel.expert_group(rank));
    // the model's number of the expert in each slot of this rank
    let expert = |slot: usize| match slot as u64 {
        routed if routed < s.per_group => (group * s.per_group + routed) as usize,
        fused => (s.routed + fused - s.per_group) as usize,
    };
    let slots = w2_scale_2.len();
    let (a1, a2): (Vec<f32>, Vec<f32>) = if s.per_expert {
        let own = (0..slots).map(expert);
        own.map(|e| (nvfp4::maximum(&w13_input[2 * e..2 * e + 2]), w2_input[e])).unzip()
    } else {
        (vec![nvfp4::maximum(&w13_input); slots], vec![nvfp4::maximum(&w2_input); slots])
    };
    let products = |a: &[f32], b: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| nvfp4::product(*a, b)).collect()
    };
    let g1 = products(&a1, &mut w13_scale_2.iter().copied().step_by(2));
    let g2 = products(&a2, &mut w2_scale_2.iter().copied());
    let inverses = |a: &[f32]| -> Vec<f32> { a.iter().map(|a| nvfp4::inverse(*a)).collect() };
    let (quant_1, quant_2) = (inverses(&a1), inverses(&a2));
    // SAFETY: nobody else touches the outputs, says the caller.
    unsafe {
        store(memory, s.g1_alphas, &g1);
        store(memory, s.g2_alphas, &g2);
        // `[]` where the maxima are global: the first value is all of them
        store(memory, s.w13_quant, &quant_1);
        store(memory, s.w2_quant, &quant_2);
        if let Some(param) = s.g1_scale_c {
            store(memory, param, &products(&quant_2, &mut g1.iter().copied()));
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn kv_scales(scales: &KvScales, memory: &ParamMemory) -> Result<(), RankError> {
    // SAFETY: the caller promises exclusive access; k and v are different parameters.
    let (k, v) = unsafe { (memory.bytes_mut(scales.k), memory.bytes_mut(scales.v)) };
    let read = |bytes: &[u8]| bytes.first_chunk().map_or(f32::NAN, |b| f32::from_le_bytes(*b));
    let (k_scale, v_scale) = (read(k), scales.v_given.then(|| read(v)));
    let Some((settled_k, settled_v)) = kv::settled(k_scale, v_scale) else {
        return Err(contradiction(memory, scales, k_scale, v_scale.unwrap_or(f32::NAN)));
    };
    k.copy_from_slice(&settled_k.to_le_bytes());
    v.copy_from_slice(&settled_v.to_le_bytes());
    Ok(())
}

/// A pair of KV-cache scales that cannot be settled.
fn contradiction(memory: &ParamMemory, scales: &KvScales, k: f32, v: f32) -> RankError {
    RankError::Values {
        param: memory.placement().params[scales.v as usize].name.clone(),
        reason: format!("v_scale is {v}, which needs a positive k_scale, found {k}"),
    }
}
