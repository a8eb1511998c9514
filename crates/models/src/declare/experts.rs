//! Routed experts: stacked into `w13_*` and `w2_*`, shared out over expert groups, cut within a group.
//!
//! Source: reference §2.3, §3.5; contract §4, "Sharding".

use crate::{
    declare::{
        Declare, ParamId, Split, finish,
        linear::{Matrix, Scalars},
    },
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    options::KernelLayout,
    parallel::Members,
    quant::{Content, Scheme},
};

/// The routed experts of one layer.
#[derive(Debug, Clone)]
pub struct Experts {
    /// Runtime name of the module (`….mlp.experts`).
    pub name: String,
    /// Checkpoint module of each expert (`….mlp.experts.7`), routed ones first.
    pub sources: Vec<String>,
    /// How many of `sources` are routed; the rest (0 or 1) is the fused shared expert.
    pub routed: u64,
    /// moe_intermediate_size.
    pub inner: u64,
    /// hidden_size.
    pub hidden: u64,
}

/// What [`Declare::experts`] made.
#[derive(Debug, Clone, Copy)]
pub struct ExpertParams {
    /// How the experts are stored.
    pub scheme: Scheme,
    /// The gate/up weights.
    pub w13: ParamId,
    /// The down weights.
    pub w2: ParamId,
    /// Their block scales, if the scheme has any.
    pub scales: Option<[ParamId; 2]>,
    /// Their per-tensor scalars, if the scheme has any: of w13, of w2.
    pub scalars: [Scalars; 2],
    /// Experts on one rank, a fused shared one included.
    pub local: u64,
    /// Routed experts of one expert group.
    pub per_group: u64,
    /// Rows of one half of w13 on a rank, padding included.
    pub inner: u64,
}

/// How the experts of one layer are cut.
struct ExpertCut {
    /// Experts on one rank, a fused shared one included.
    local: u64,
    /// Routed experts of one expert group.
    per_group: u64,
    /// Rows of one half of w13 on a rank, padding included.
    inner_padded: u64,
    /// Whether up comes before gate.
    up_first: bool,
}

impl ExpertCut {
    /// The projections of w13 with the half that each fills.
    fn halves(&self) -> [(u64, &'static str); 2] {
        let up = u64::from(!self.up_first);
        [(1 - up, "gate_proj"), (up, "up_proj")]
    }
}

impl Declare<'_> {
    /// The routed experts of one layer as `w13_*` and `w2_*` (§2.3, §3.5).
    ///
    /// # Errors
    /// Experts or sizes that do not divide, experts stored in different ways, shares that are not whole groups.
    pub fn experts(&mut self, experts: &Experts) -> Result<ExpertParams, PlanError> {
        let scheme = self.expert_scheme(experts)?;
        let cut = self.expert_cut(experts, scheme)?;
        let mut made = ExpertParams {
            scheme,
            w13: 0,
            w2: 0,
            scales: None,
            scalars: Default::default(),
            local: cut.local,
            per_group: cut.per_group,
            inner: cut.inner_padded,
        };
        for stored in scheme.stored() {
            match stored.content {
                Content::Matrix { row_unit, col_unit } => {
                    let form = self.form(scheme, stored, row_unit, col_unit);
                    let w13 = self.w13(experts, &cut, stored.suffix, form);
                    let w2 = self.w2(experts, &cut, stored.suffix, form);
                    if stored.is_scale() {
                        made.scales = Some([w13, w2]);
                    } else {
                        (made.w13, made.w2) = (w13, w2);
                    }
                }
                Content::Scalar => {
                    let params = self.expert_scalars(experts, &cut, stored.suffix);
                    for (scalars, param) in made.scalars.iter_mut().zip(params) {
                        scalars.set(stored.suffix, param);
                    }
                }
                Content::Shape => self.expert_shapes(experts, &cut, stored.suffix),
            }
        }
        finish::experts(self, experts, &made)?;
        Ok(made)
    }

    fn expert_scheme(&self, experts: &Experts) -> Result<Scheme, PlanError> {
        let projections = ["gate_proj", "up_proj", "down_proj"];
        let modules: Vec<String> = experts
            .sources
            .iter()
            .flat_map(|source| projections.map(|projection| format!("{source}.{projection}")))
            .collect();
        self.common_scheme(&experts.name, modules.iter().map(String::as_str))
    }

    fn expert_cut(&self, experts: &Experts, scheme: Scheme) -> Result<ExpertCut, PlanError> {
        let (ep, moe_tp) = (u64::from(self.parallel.ep()), u64::from(self.parallel.moe_tp()));
        let refuse = |found: String, expected: &str| {
            Err(PlanError::unsupported(experts.name.clone(), found, expected))
        };
        if experts.routed % ep != 0 {
            return refuse(
                format!("{} experts, ep {ep}", experts.routed),
                "ep must divide the experts",
            );
        }
        if experts.inner % moe_tp != 0 {
            let found = format!("moe_intermediate_size {}, tp/ep {moe_tp}", experts.inner);
            return refuse(found, "tp/ep must divide moe_intermediate_size");
        }
        let inner = experts.inner / moe_tp;
        let kernels = self.layout.kernels;
        let inner_padded = match (kernels, scheme) {
            (KernelLayout::Trtllm, Scheme::Bf16 | Scheme::Fp8 | Scheme::Nvfp4) => {
                inner.next_multiple_of(128)
            }
            (KernelLayout::Aiter, Scheme::Mxfp4) => inner.next_multiple_of(256),
            _ => inner,
        };
        let group = scheme.k_group();
        // FP8 blocks may be partial at the edge of a tensor, but not where experts are cut
        let edges = [experts.hidden, experts.inner];
        let edges_whole = scheme == Scheme::Fp8 || edges.iter().all(|size| size % group == 0);
        if inner_padded % group != 0 || !edges_whole {
            let found = format!(
                "moe_intermediate_size {} / {moe_tp} ranks = {inner}, hidden_size {}",
                experts.inner, experts.hidden
            );
            let expected = format!("whole groups of {group} for {}", scheme.name());
            return refuse(found, &expected);
        }
        let up_first = match kernels {
            KernelLayout::Trtllm => scheme != Scheme::Mxfp4,
            KernelLayout::FlashinferCutlass => matches!(scheme, Scheme::Bf16 | Scheme::Nvfp4),
            _ => false,
        };
        let fused = experts.sources.len() as u64 - experts.routed;
        let per_group = experts.routed / ep;
        Ok(ExpertCut { local: per_group + fused, per_group, inner_padded, up_first })
    }

    /// The slot of expert `e` on its ranks, and those ranks.
    fn expert_home(&self, experts: &Experts, cut: &ExpertCut, e: u64) -> (u64, Members) {
        if e < experts.routed {
            let group = (e / cut.per_group) as u32;
            (e % cut.per_group, Members::expert_group(self.parallel, group))
        } else {
            (cut.per_group + e - experts.routed, Members::every_group(self.parallel))
        }
    }

    fn w13(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str, form: Matrix) -> ParamId {
        let cols = experts.hidden.div_ceil(form.col_unit);
        let (rows, per) =
            (experts.inner.div_ceil(form.row_unit), cut.inner_padded.div_ceil(form.row_unit));
        let stride = cols * elem_bytes(form.dtype);
        let name = format!("{}.w13_{suffix}", experts.name);
        let param = self.param(name, form.dtype, vec![cut.local, 2 * per, cols]);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            for (half, projection) in cut.halves() {
                let tensor = format!("{module}.{projection}.{suffix}");
                let source = self.source(tensor, vec![rows, cols], form.accept, form.dtype);
                let at = (slot * 2 + half) * per * stride;
                self.piece(source, (0, rows), Split::Rows { per }, members, param, at, stride);
            }
        }
        param
    }

    fn w2(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str, form: Matrix) -> ParamId {
        let rows = experts.hidden.div_ceil(form.row_unit);
        let (cols, per) =
            (experts.inner.div_ceil(form.col_unit), cut.inner_padded.div_ceil(form.col_unit));
        let stride = per * elem_bytes(form.dtype);
        let name = format!("{}.w2_{suffix}", experts.name);
        let param = self.param(name, form.dtype, vec![cut.local, rows, per]);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            let tensor = format!("{module}.down_proj.{suffix}");
            let source = self.source(tensor, vec![rows, cols], form.accept, form.dtype);
            let at = slot * rows * stride;
            self.piece(source, (0, rows), Split::Cols { per }, members, param, at, stride);
        }
        param
    }

    /// Per-tensor scalars of experts: `weight_scale_2` for the rank's own, `input_scale` for all (§3.5).
    fn expert_scalars(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str) -> [ParamId; 2] {
        let all = suffix == "input_scale";
        let count = if all { experts.sources.len() as u64 } else { cut.local };
        let w13 = self.param(format!("{}.w13_{suffix}", experts.name), Dtype::F32, vec![count, 2]);
        let w2 = self.param(format!("{}.w2_{suffix}", experts.name), Dtype::F32, vec![count]);
        // only trtllm swaps the slots along with the halves (contract §4, "per-tensor slots of w13")
        let swap = u64::from(self.layout.kernels == KernelLayout::Trtllm);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = match all {
                true => (e as u64, Members::replicated(self.parallel)),
                false => {
                    let (slot, home) = self.expert_home(experts, cut, e as u64);
                    (slot, home.whole())
                }
            };
            for (i, projection) in [(0, "gate_proj"), (1, "up_proj")] {
                let source = self.scalar(format!("{module}.{projection}.{suffix}"));
                self.slot(source, members, w13, slot * 2 + (i ^ swap));
            }
            let source = self.scalar(format!("{module}.down_proj.{suffix}"));
            self.slot(source, members, w2, slot);
        }
        [w13, w2]
    }

    fn expert_shapes(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str) {
        let w13 =
            self.param(format!("{}.w13_{suffix}", experts.name), Dtype::I64, vec![cut.local, 2]);
        let w2 =
            self.param(format!("{}.w2_{suffix}", experts.name), Dtype::I64, vec![cut.local, 2]);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            let split = Split::Rows { per: 2 };
            for (projection, param) in [("gate_proj", w13), ("down_proj", w2)] {
                let source = self.shape_source(format!("{module}.{projection}.{suffix}"));
                self.piece(source, (0, 2), split, members.whole(), param, slot * 16, 8);
            }
            let up = self.shape_source(format!("{module}.up_proj.{suffix}"));
            self.out.unplaced.push((up, "the gate's shape counts for the fused weight"));
        }
    }
}
