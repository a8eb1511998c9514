//! What a scheme's parameters still need for the kernels of a layout, once they are complete.
//!
//! A derived block scale takes the place of its source wherever dtype and shape allow (two names, one storage), and has
//! storage of its own elsewhere; scalars are always independent. Source: reference §4a, §4b, §4e, §4g; contract §4,
//! "Post-processing".

use crate::{
    declare::{
        Declare,
        experts::{ExpertParams, Experts},
        linear::LinearParams,
    },
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    options::KernelLayout,
    quant::Scheme,
    transform::{
        ExpertScalars, Finish, LinearScalars, Matrices, Reordering, RowOrder, SwizzleInto,
    },
};

/// Rows of a block and columns of a word of the 128×4 layout.
const SWIZZLE_ROWS: u64 = 128;
const SWIZZLE_COLS: u64 = 4;

/// What rows and elements of K of a linear weight are rounded up to (§4a).
pub(super) fn linear_padding(scheme: Scheme, kernels: KernelLayout) -> (u64, u64) {
    match (scheme, kernels) {
        (Scheme::Nvfp4, KernelLayout::Cutlass | KernelLayout::FlashinferCutlass) => (32, 32),
        (Scheme::Nvfp4, KernelLayout::Trtllm) => (128, 64),
        _ => (1, 1),
    }
}

/// Finishes a linear layer; only NVFP4 has anything to do (§4a, §4c, §4e).
pub(super) fn linear(d: &mut Declare<'_>, name: &str, made: &LinearParams) {
    let kernels = d.layout.kernels;
    let Some(scale) = made.scale.filter(|_| made.scheme == Scheme::Nvfp4) else {
        return;
    };
    let order = match kernels {
        KernelLayout::Cutlass | KernelLayout::FlashinferCutlass => RowOrder::AsStored,
        KernelLayout::Trtllm => RowOrder::Shuffled32,
        KernelLayout::None | KernelLayout::Aiter => return,
    };
    if order != RowOrder::AsStored {
        let weight = matrices(d, made.weight, 1);
        d.after(Finish::Reorder(weight, Reordering::Rows(order)));
    }
    let alpha = d.derived(format!("{name}.alpha"), Dtype::F32, Vec::new());
    let inverse = d.derived(format!("{name}.input_scale_inv"), Dtype::F32, Vec::new());
    let (scale_2, input_scale) = (made.scalars.scale_2, made.scalars.input_scale);
    d.after(Finish::LinearScalars(LinearScalars { scale_2, input_scale, alpha, inverse }));
    let source = Matrices { param: scale, count: 1, rows: made.rows, row_bytes: made.k / 16 };
    swizzled(d, source, order, format!("{name}.weight_scale_interleaved"), &[]);
}

/// Finishes the experts of one layer.
///
/// # Errors
/// Sizes that the kernels of the layout cannot take.
pub(super) fn experts(
    d: &mut Declare<'_>,
    experts: &Experts,
    made: &ExpertParams,
) -> Result<(), PlanError> {
    match (made.scheme, d.layout.kernels) {
        (Scheme::Bf16, KernelLayout::Trtllm) => blocked(d, experts, made),
        (Scheme::Nvfp4, KernelLayout::Cutlass | KernelLayout::FlashinferCutlass) => {
            let rows = 2 * made.inner;
            check(experts, rows % SWIZZLE_ROWS == 0, || {
                let found = format!("{rows} rows of w13 on a rank");
                (found, "NVFP4 experts of the cutlass layouts need a multiple of 128")
            })?;
            nvfp4_scales(d, experts, made, [RowOrder::AsStored; 2]);
            nvfp4_scalars(d, experts, made);
            Ok(())
        }
        (Scheme::Nvfp4, KernelLayout::Trtllm) => {
            check(experts, experts.hidden % SWIZZLE_ROWS == 0, || {
                let found = format!("hidden_size {}", experts.hidden);
                (found, "NVFP4 experts of --kernel-layout trtllm need a multiple of 128")
            })?;
            let orders = [RowOrder::GatedShuffled32, RowOrder::Shuffled32];
            for (weight, order) in [made.w13, made.w2].into_iter().zip(orders) {
                let weight = matrices(d, weight, made.local);
                d.after(Finish::Reorder(weight, Reordering::Rows(order)));
            }
            nvfp4_scales(d, experts, made, orders);
            nvfp4_scalars(d, experts, made);
            Ok(())
        }
        (Scheme::Mxfp4, KernelLayout::Aiter) => tiled(d, experts, made),
        _ => Ok(()),
    }
}

/// A complete parameter as `count` matrices.
fn matrices(d: &mut Declare<'_>, param: u32, count: u64) -> Matrices {
    let p = d.param_mut(param);
    let (elem, shape) = (elem_bytes(p.dtype), &p.shape);
    let [.., rows, cols] = shape[..] else {
        return Matrices { param, count, rows: 1, row_bytes: p.bytes / count.max(1) };
    };
    Matrices { param, count, rows, row_bytes: cols * elem }
}

/// The swizzled form of block scales, under a name of its own: in the source's place where it fits.
fn swizzled(d: &mut Declare<'_>, source: Matrices, order: RowOrder, name: String, leading: &[u64]) {
    let (rows, cols) = (source.rows, source.row_bytes);
    if rows % SWIZZLE_ROWS == 0 && cols % SWIZZLE_COLS == 0 {
        d.after(Finish::Reorder(source, Reordering::Swizzled(order)));
        d.alias(name, source.param);
        return;
    }
    let mut shape = leading.to_vec();
    shape.extend([rows.next_multiple_of(SWIZZLE_ROWS), cols.next_multiple_of(SWIZZLE_COLS)]);
    let target = d.derived(name, Dtype::F8_E4M3, shape);
    d.after(Finish::SwizzleInto(SwizzleInto { source, target, order }));
}

fn nvfp4_scales(
    d: &mut Declare<'_>,
    experts: &Experts,
    made: &ExpertParams,
    orders: [RowOrder; 2],
) {
    for ((param, order), w) in made.scales.into_iter().flatten().zip(orders).zip(["w13", "w2"]) {
        let source = matrices(d, param, made.local);
        let name = format!("{}.{w}_blockscale_swizzled", experts.name);
        swizzled(d, source, order, name, &[made.local]);
    }
}

fn nvfp4_scalars(d: &mut Declare<'_>, experts: &Experts, made: &ExpertParams) {
    let kernels = d.layout.kernels;
    // one maximum over all experts, except where the kernels take one per expert (contract §4)
    let per_expert = kernels == KernelLayout::Cutlass;
    let mut derived = |name: &str, shape: Vec<u64>| {
        d.derived(format!("{}.{name}", experts.name), Dtype::F32, shape)
    };
    let each = vec![made.local];
    let quant = if per_expert { each.clone() } else { Vec::new() };
    let [w13, w2] = made.scalars;
    let scalars = ExpertScalars {
        w13_scale_2: w13.scale_2,
        w2_scale_2: w2.scale_2,
        w13_input: w13.input_scale,
        w2_input: w2.input_scale,
        g1_alphas: derived("g1_alphas", each.clone()),
        g2_alphas: derived("g2_alphas", each.clone()),
        w13_quant: derived("w13_input_scale_quant", quant.clone()),
        w2_quant: derived("w2_input_scale_quant", quant),
        g1_scale_c: (kernels == KernelLayout::Trtllm).then(|| derived("g1_scale_c", each)),
        per_expert,
        routed: experts.routed,
        per_group: made.per_group,
    };
    d.after(Finish::ExpertScalars(scalars));
}

/// Unquantised experts of `trtllm`: rows permuted, then 128-byte blocks of columns (§4g).
fn blocked(d: &mut Declare<'_>, experts: &Experts, made: &ExpertParams) -> Result<(), PlanError> {
    let block_elems = 128 / elem_bytes(d.dtype);
    check(experts, experts.hidden % 64 == 0, || {
        let found = format!("hidden_size {}", experts.hidden);
        (found, "a multiple of 64 for --kernel-layout trtllm")
    })?;
    let orders = [RowOrder::GatedShuffled32, RowOrder::Shuffled32];
    for (param, order) in [made.w13, made.w2].into_iter().zip(orders) {
        let raw = matrices(d, param, made.local);
        check(experts, raw.rows % 32 == 0 && raw.row_bytes % 128 == 0, || {
            let found = format!("{} rows of {} bytes", raw.rows, raw.row_bytes);
            (found, "multiples of 32 rows and 128 bytes for --kernel-layout trtllm")
        })?;
        d.param_mut(param).shape = vec![made.local, raw.row_bytes / 128, raw.rows, block_elems];
        d.after(Finish::Reorder(raw, Reordering::Blocks(order)));
    }
    Ok(())
}

/// MXFP4 experts of AITER, the gfx950 form (§4e): weights in 16×16 tiles, the scales of all experts shuffled as one matrix.
fn tiled(d: &mut Declare<'_>, experts: &Experts, made: &ExpertParams) -> Result<(), PlanError> {
    for param in [made.w13, made.w2] {
        let weight = matrices(d, param, made.local);
        check(experts, weight.rows % 16 == 0 && weight.row_bytes % 32 == 0, || {
            let found = format!("weight of {} rows and {} bytes", weight.rows, weight.row_bytes);
            (found, "--kernel-layout aiter needs multiples of 16 rows and 32 bytes")
        })?;
        d.after(Finish::Reorder(weight, Reordering::WeightTiles));
    }
    for param in made.scales.into_iter().flatten() {
        let each = matrices(d, param, made.local);
        let all = Matrices { count: 1, rows: each.count * each.rows, ..each };
        check(experts, all.rows % 256 == 0 && all.row_bytes % 8 == 0, || {
            let found = format!(
                "scales of {} experts × {} rows and {} columns",
                each.count, each.rows, each.row_bytes
            );
            (found, "--kernel-layout aiter needs multiples of 256 rows in all and 8 columns")
        })?;
        d.after(Finish::Reorder(all, Reordering::ScaleTiles));
    }
    Ok(())
}

fn check(
    experts: &Experts,
    holds: bool,
    otherwise: impl FnOnce() -> (String, &'static str),
) -> Result<(), PlanError> {
    if holds {
        return Ok(());
    }
    let (found, expected) = otherwise();
    Err(PlanError::unsupported(experts.name.clone(), found, expected))
}
