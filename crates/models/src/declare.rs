//! The declaration of a model: which parameters it has, which tensors they are made of, and how both are cut.
//!
//! A family (`arch/*.rs`) says in the vocabulary of [`Declare`] what its layers are; schemes (`quant.rs`) say how one
//! linear layer is stored. Both meet here, so a new family knows nothing of schemes and a new scheme nothing of
//! families. A declaration names tensors that ought to exist; [`crate::placement`] matches it with a checkpoint, and
//! `synth` writes a checkpoint from it.

use crate::{
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    options::{KernelLayout, Layout},
    parallel::{Members, Parallel},
    quant::{Content, Scheme},
    transform::Finish,
};

/// Index of a parameter in [`Declaration::params`].
pub type ParamId = u32;

/// A runtime parameter; names, dtypes and shapes are the same on every rank.
#[derive(Debug, Clone)]
pub struct Param {
    /// The runtime's name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape on one rank, as it is handed over.
    pub shape: Vec<u64>,
    /// Bytes of its storage.
    pub bytes: u64,
    /// The leading bytes that pieces fill (without trailing padding rows); 0 for a derived parameter.
    pub filled_bytes: u64,
    /// The layer that it belongs to, for progress and per-layer work.
    pub layer: Option<u32>,
    /// Whether it is computed from other parameters rather than read.
    pub derived: bool,
}

/// Two names for one storage (§4.0, alias_or_bind).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    /// The derived name.
    pub name: String,
    /// The parameter whose storage it shares.
    pub source: ParamId,
}

/// Which dtypes of a tensor are accepted for a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// Just this one.
    Exactly(Dtype),
    /// Any float, converted.
    AnyFloat,
    /// I32 or I64, converted.
    AnyInt,
}

/// A tensor that ought to be in the checkpoint.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its canonical name.
    pub name: String,
    /// Its shape; a scalar (`[]`) also matches `[1]`.
    pub shape: Vec<u64>,
    /// Which dtypes are accepted.
    pub accept: Accept,
    /// The dtype that it is usually stored in.
    pub usual: Dtype,
}

/// Along which axis a piece is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Part `p` is rows `p·per .. (p+1)·per`, clipped to the tensor.
    Rows {
        /// Rows per part.
        per: u64,
    },
    /// Part `p` is elements `p·per .. (p+1)·per` of every row, clipped to the tensor.
    Cols {
        /// Elements per part.
        per: u64,
    },
}

/// A rectangle of a source tensor that lands, cut into parts, in one parameter of each member rank.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The tensor (index into [`Declaration::sources`]).
    pub source: u32,
    /// The rows of it that belong to this piece.
    pub rows: (u64, u64),
    /// How these rows are cut into parts.
    pub split: Split,
    /// Who holds which part.
    pub members: Members,
    /// The parameter.
    pub param: ParamId,
    /// First byte within the parameter.
    pub target_offset: u64,
    /// Bytes from one row to the next within the parameter.
    pub target_stride: u64,
}

/// Everything that a model needs and makes.
#[derive(Debug, Clone, Default)]
pub struct Declaration {
    /// The parameters, in model order.
    pub params: Vec<Param>,
    /// The tensors that are needed.
    pub sources: Vec<Source>,
    /// How tensors land in parameters.
    pub pieces: Vec<Piece>,
    /// Tensors that must exist but are not kept, with the reason.
    pub unplaced: Vec<(u32, &'static str)>,
    /// What is computed once parameters are complete.
    pub finishes: Vec<Finish>,
    /// Second names.
    pub aliases: Vec<Alias>,
}

/// What a declaration may ask about the checkpoint it is made for.
pub trait Lookup {
    /// How `module` is stored, if any tensor of it exists.
    fn scheme(&self, module: &str) -> Option<Scheme>;
    /// Whether a tensor of that canonical name exists.
    fn has(&self, tensor: &str) -> bool;
}

/// One logical layer within a (possibly fused) linear parameter.
#[derive(Debug, Clone)]
pub struct Part {
    /// The module's canonical name in the checkpoint.
    pub source: String,
    /// Output rows in the checkpoint.
    pub rows: u64,
    /// Output rows on one rank.
    pub per: u64,
    /// Who holds which rows.
    pub members: Members,
}

/// How the input dimension of a linear layer is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Every rank has all of K.
    Whole,
    /// Every rank has K / tp columns (row parallel).
    Split,
}

/// How many slots the per-tensor scalars of a fused layer have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slots {
    /// One per part (§3.2).
    PerPart,
    /// One: the first part's value counts, the others are discarded (§2.2).
    First,
}

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

/// Builds a [`Declaration`]; the vocabulary in which families are written.
pub struct Declare<'a> {
    /// The group of ranks.
    pub parallel: Parallel,
    /// The kernels that parameters end in.
    pub layout: Layout,
    /// dtype of unquantised parameters.
    pub dtype: Dtype,
    /// The layer being declared.
    pub layer: Option<u32>,
    lookup: &'a dyn Lookup,
    out: Declaration,
}

impl std::fmt::Debug for Declare<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Declare")
            .field("params", &self.out.params.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Declare<'a> {
    /// Starts an empty declaration.
    pub fn new(parallel: Parallel, layout: Layout, dtype: Dtype, lookup: &'a dyn Lookup) -> Self {
        Self {
            parallel,
            layout,
            dtype,
            layer: None,
            lookup,
            out: Declaration::default(),
        }
    }

    /// The finished declaration.
    pub fn finish(self) -> Declaration {
        self.out
    }

    /// Whether the checkpoint has this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.lookup.has(tensor)
    }

    /// How `module` is stored, if at all.
    pub fn scheme(&self, module: &str) -> Option<Scheme> {
        self.lookup.scheme(module)
    }

    /// An unquantised tensor that every rank holds in full, in the model's dtype.
    pub fn replicated(&mut self, name: &str, source: &str, shape: &[u64]) {
        self.replicated_as(name, source, shape, self.dtype, self.dtype);
    }

    /// An unquantised tensor that every rank holds in full as `dtype`; files usually have it as `usual`.
    pub fn replicated_as(
        &mut self,
        name: &str,
        source: &str,
        shape: &[u64],
        dtype: Dtype,
        usual: Dtype,
    ) {
        let param = self.param(name.to_owned(), dtype, shape.to_vec());
        let source = self.source(source.to_owned(), shape.to_vec(), Accept::AnyFloat, usual);
        let rows = rows_of(shape);
        let row_bytes = self.out.params[param as usize].bytes / rows.max(1);
        let members = Members::replicated(self.parallel);
        self.piece(
            source,
            (0, rows),
            Split::Rows { per: rows },
            members,
            param,
            0,
            row_bytes,
        );
    }

    /// A vocabulary matrix `[V, H]`: V padded to a multiple of 64, rows cut, rows past V zero (§3.6).
    ///
    /// # Errors
    /// The padded vocabulary does not divide by tp.
    pub fn vocab(
        &mut self,
        name: &str,
        source: &str,
        v: u64,
        h: u64,
    ) -> Result<ParamId, PlanError> {
        let tp = u64::from(self.parallel.tp());
        let padded = v.next_multiple_of(64);
        if padded % tp != 0 {
            let found = format!("vocab_size {v}, padded to {padded}, tp {tp}");
            return Err(PlanError::unsupported(
                name,
                found,
                "tp must divide the padded vocabulary",
            ));
        }
        let per = padded / tp;
        let param = self.param(name.to_owned(), self.dtype, vec![per, h]);
        let source = self.source(source.to_owned(), vec![v, h], Accept::AnyFloat, self.dtype);
        let members = Members::split(self.parallel, 1);
        let stride = h * elem_bytes(self.dtype);
        self.piece(
            source,
            (0, v),
            Split::Rows { per },
            members,
            param,
            0,
            stride,
        );
        Ok(param)
    }

    /// A part whose rows are cut evenly over all ranks.
    ///
    /// # Errors
    /// tp does not divide the rows.
    pub fn column(&self, source: String, rows: u64) -> Result<Part, PlanError> {
        let tp = u64::from(self.parallel.tp());
        if rows % tp != 0 {
            let found = format!("{rows} output rows, tp {tp}");
            return Err(PlanError::unsupported(
                source,
                found,
                "tp must divide the output rows",
            ));
        }
        Ok(Part {
            source,
            rows,
            per: rows / tp,
            members: Members::split(self.parallel, 1),
        })
    }

    /// A part that every rank holds in full.
    pub fn whole(&self, source: String, rows: u64) -> Part {
        Part {
            source,
            rows,
            per: rows,
            members: Members::replicated(self.parallel),
        }
    }

    /// The q, k and v parts of attention with `heads` and `kv_heads` of `head_dim` rows (§3.2, QKV).
    ///
    /// # Errors
    /// tp does not divide the heads, or kv heads and tp do not divide each other.
    pub fn qkv(
        &self,
        sources: [String; 3],
        heads: u64,
        kv_heads: u64,
        head_dim: u64,
    ) -> Result<[Part; 3], PlanError> {
        let tp = u64::from(self.parallel.tp());
        let [q, k, v] = sources;
        if heads % tp != 0 {
            let found = format!("{heads} attention heads, tp {tp}");
            return Err(PlanError::unsupported(
                q,
                found,
                "tp must divide num_attention_heads",
            ));
        }
        if kv_heads % tp != 0 && tp % kv_heads != 0 {
            let found = format!("{kv_heads} key/value heads, tp {tp}");
            let expected = "num_key_value_heads and tp must divide one another";
            return Err(PlanError::unsupported(k, found, expected));
        }
        let rep = if tp >= kv_heads { tp / kv_heads } else { 1 };
        let kv = |source| Part {
            source,
            rows: kv_heads * head_dim,
            per: kv_heads * head_dim * rep / tp,
            members: Members::split(self.parallel, rep as u32),
        };
        Ok([self.column(q, heads * head_dim)?, kv(k), kv(v)])
    }

    /// A linear layer, fused from `parts` (stacked along the output), with all tensors of its scheme and its bias.
    ///
    /// # Errors
    /// Parts stored in different ways, or shares that are not whole groups or blocks (contract §4, "refused").
    pub fn linear(
        &mut self,
        name: &str,
        parts: &[Part],
        k: u64,
        input: Input,
        slots: Slots,
    ) -> Result<LinearParams, PlanError> {
        let scheme = self.common_scheme(name, parts.iter().map(|p| p.source.as_str()))?;
        self.check_blocks(name, scheme, parts, k, input)?;
        let mut made = LinearParams {
            scheme,
            weight: 0,
            scale: None,
        };
        for stored in scheme.stored() {
            let full = format!("{name}.{}", stored.suffix);
            let accept = if stored.float {
                Accept::AnyFloat
            } else {
                Accept::Exactly(stored.dtype)
            };
            match stored.content {
                Content::Matrix { row_unit, col_unit } => {
                    let dtype = if scheme == Scheme::Bf16 {
                        self.dtype
                    } else {
                        stored.dtype
                    };
                    let form = Matrix {
                        row_unit,
                        col_unit,
                        dtype,
                        accept,
                    };
                    let param = self.matrix(full, stored.suffix, parts, k, input, form);
                    if stored.suffix.starts_with("weight_scale") {
                        made.scale = Some(param);
                    } else {
                        made.weight = param;
                    }
                }
                Content::Scalar => self.linear_scalars(full, stored.suffix, parts, slots),
                Content::Shape => self.linear_shape(full, stored.suffix, parts, k),
            }
        }
        self.bias(name, parts, input);
        Ok(made)
    }

    fn matrix(
        &mut self,
        name: String,
        suffix: &str,
        parts: &[Part],
        k: u64,
        input: Input,
        form: Matrix,
    ) -> ParamId {
        let cols = k.div_ceil(form.col_unit);
        let per_cols = match input {
            Input::Whole => cols,
            Input::Split => (k / u64::from(self.parallel.tp())).div_ceil(form.col_unit),
        };
        let stored_per = |p: &Part| p.per.div_ceil(form.row_unit);
        let rows: u64 = parts.iter().map(stored_per).sum();
        let stride = per_cols * elem_bytes(form.dtype);
        let param = self.param(name, form.dtype, vec![rows, per_cols]);
        let mut at = 0;
        for part in parts {
            let stored_rows = part.rows.div_ceil(form.row_unit);
            let tensor = format!("{}.{suffix}", part.source);
            let source = self.source(tensor, vec![stored_rows, cols], form.accept, form.dtype);
            let (split, members) = match input {
                Input::Whole => (
                    Split::Rows {
                        per: stored_per(part),
                    },
                    part.members,
                ),
                Input::Split => (
                    Split::Cols { per: per_cols },
                    Members::split(self.parallel, 1),
                ),
            };
            self.piece(source, (0, stored_rows), split, members, param, at, stride);
            at += stored_per(part) * stride;
        }
        param
    }

    fn linear_scalars(&mut self, name: String, suffix: &str, parts: &[Part], slots: Slots) {
        let count = if slots == Slots::First {
            1
        } else {
            parts.len() as u64
        };
        let param = self.param(name, Dtype::F32, vec![count]);
        for (i, part) in parts.iter().enumerate() {
            let source = self.scalar(format!("{}.{suffix}", part.source));
            if (i as u64) < count {
                self.slot(source, Members::replicated(self.parallel), param, i as u64);
            } else {
                self.out
                    .unplaced
                    .push((source, "the first part's scalar counts for the fused layer"));
            }
        }
    }

    fn linear_shape(&mut self, name: String, suffix: &str, parts: &[Part], k: u64) {
        let param = self.param(name, Dtype::I64, vec![2]);
        for (i, part) in parts.iter().enumerate() {
            let source = self.shape_source(format!("{}.{suffix}", part.source));
            if i == 0 {
                let members = Members::replicated(self.parallel);
                self.piece(source, (0, 2), Split::Rows { per: 2 }, members, param, 0, 8);
            } else {
                self.out
                    .unplaced
                    .push((source, "the first part's shape counts for the fused layer"));
            }
        }
        debug_assert!(k > 0);
    }

    fn bias(&mut self, name: &str, parts: &[Part], input: Input) {
        let names: Vec<String> = parts.iter().map(|p| format!("{}.bias", p.source)).collect();
        if !names.iter().any(|n| self.lookup.has(n)) {
            return;
        }
        let elem = elem_bytes(self.dtype);
        let rows = parts.iter().map(|p| p.per).sum();
        let param = self.param(format!("{name}.bias"), self.dtype, vec![rows]);
        let mut at = 0;
        for (part, tensor) in parts.iter().zip(names) {
            let source = self.source(tensor, vec![part.rows], Accept::AnyFloat, self.dtype);
            // the bias of a row-parallel layer is whole on every rank (§3.2)
            let members = match input {
                Input::Whole => part.members,
                Input::Split => Members::replicated(self.parallel),
            };
            let split = Split::Rows { per: part.per };
            self.piece(source, (0, part.rows), split, members, param, at, elem);
            at += part.per * elem;
        }
    }

    /// The scheme that all of `modules` are stored in.
    fn common_scheme<'m>(
        &self,
        param: &str,
        modules: impl Iterator<Item = &'m str>,
    ) -> Result<Scheme, PlanError> {
        let mut common: Option<(Scheme, &str)> = None;
        for module in modules {
            let Some(scheme) = self.lookup.scheme(module) else {
                continue;
            };
            match common {
                Some((first_scheme, first)) if first_scheme != scheme => {
                    return Err(PlanError::MixedSchemes {
                        param: param.into(),
                        first: first.into(),
                        first_scheme: first_scheme.name().into(),
                        second: module.into(),
                        second_scheme: scheme.name().into(),
                    });
                }
                _ => common = Some((scheme, module)),
            }
        }
        Ok(common.map_or(Scheme::Bf16, |(scheme, _)| scheme))
    }

    fn check_blocks(
        &self,
        name: &str,
        scheme: Scheme,
        parts: &[Part],
        k: u64,
        input: Input,
    ) -> Result<(), PlanError> {
        let tp = u64::from(self.parallel.tp());
        let group = scheme.k_group();
        if scheme != Scheme::Fp8 && k % group != 0 {
            let found = format!("K = {k}");
            let expected = format!("K must be whole groups of {group} for {}", scheme.name());
            return Err(PlanError::unsupported(name, found, expected));
        }
        if input == Input::Split && tp > 1 && (k % tp != 0 || (k / tp) % group != 0) {
            let found = format!("K = {k}, tp {tp}");
            let expected = match group {
                1 => "tp must divide K".to_owned(),
                _ => format!(
                    "K / tp must be whole groups of {group} for {}",
                    scheme.name()
                ),
            };
            return Err(PlanError::unsupported(name, found, expected));
        }
        if scheme != Scheme::Fp8 || input == Input::Split {
            return Ok(());
        }
        let replicated = parts
            .iter()
            .all(|p| p.per == p.rows && p.members.parts() == 1);
        // a stack of whole parts lines up when all but the last end on a block; cut parts must be whole blocks
        let strict = if replicated && parts.len() > 1 {
            &parts[..parts.len() - 1]
        } else if parts.len() > 1 || tp > 1 && !replicated {
            parts
        } else {
            &[]
        };
        match strict.iter().find(|p| p.per % 128 != 0) {
            None => Ok(()),
            Some(p) => {
                let found = format!("{}: {} output rows on a rank (tp {tp})", p.source, p.per);
                let expected = "FP8 rows per rank and part must be whole 128-row blocks";
                Err(PlanError::unsupported(name, found, expected))
            }
        }
    }

    /// Adds a parameter that pieces will fill.
    pub fn param(&mut self, name: String, dtype: Dtype, shape: Vec<u64>) -> ParamId {
        let bytes = shape.iter().product::<u64>() * elem_bytes(dtype);
        self.push_param(name, dtype, shape, bytes, false)
    }

    /// Adds a parameter that a finish computes.
    pub fn derived(&mut self, name: String, dtype: Dtype, shape: Vec<u64>) -> ParamId {
        let bytes = shape.iter().product::<u64>() * elem_bytes(dtype);
        self.push_param(name, dtype, shape, bytes, true)
    }

    fn push_param(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: Vec<u64>,
        bytes: u64,
        derived: bool,
    ) -> ParamId {
        let filled_bytes = if derived { 0 } else { bytes };
        let layer = self.layer;
        self.out.params.push(Param {
            name,
            dtype,
            shape,
            bytes,
            filled_bytes,
            layer,
            derived,
        });
        self.out.params.len() as ParamId - 1
    }

    /// A parameter that was added.
    pub fn param_mut(&mut self, param: ParamId) -> &mut Param {
        &mut self.out.params[param as usize]
    }

    /// Adds a second name for a parameter.
    pub fn alias(&mut self, name: impl Into<String>, source: ParamId) {
        self.out.aliases.push(Alias {
            name: name.into(),
            source,
        });
    }

    /// Adds work to do once parameters are complete.
    pub fn after(&mut self, finish: Finish) {
        self.out.finishes.push(finish);
    }

    /// Adds a tensor that ought to exist.
    pub fn source(&mut self, name: String, shape: Vec<u64>, accept: Accept, usual: Dtype) -> u32 {
        self.out.sources.push(Source {
            name,
            shape,
            accept,
            usual,
        });
        self.out.sources.len() as u32 - 1
    }

    fn scalar(&mut self, name: String) -> u32 {
        self.source(name, Vec::new(), Accept::AnyFloat, Dtype::F32)
    }

    fn shape_source(&mut self, name: String) -> u32 {
        self.source(name, vec![2], Accept::AnyInt, Dtype::I64)
    }

    /// A scalar that lands in slot `slot` of an F32 parameter.
    fn slot(&mut self, source: u32, members: Members, param: ParamId, slot: u64) {
        self.piece(
            source,
            (0, 1),
            Split::Rows { per: 1 },
            members,
            param,
            slot * 4,
            4,
        );
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a piece, in order")]
    fn piece(
        &mut self,
        source: u32,
        rows: (u64, u64),
        split: Split,
        members: Members,
        param: ParamId,
        target_offset: u64,
        target_stride: u64,
    ) {
        self.out.pieces.push(Piece {
            source,
            rows,
            split,
            members,
            param,
            target_offset,
            target_stride,
        });
    }

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
            local: cut.local,
            inner: cut.inner_padded,
        };
        for stored in scheme.stored() {
            let accept = if stored.float {
                Accept::AnyFloat
            } else {
                Accept::Exactly(stored.dtype)
            };
            match stored.content {
                Content::Matrix { row_unit, col_unit } => {
                    let dtype = if scheme == Scheme::Bf16 {
                        self.dtype
                    } else {
                        stored.dtype
                    };
                    let form = Matrix {
                        row_unit,
                        col_unit,
                        dtype,
                        accept,
                    };
                    let w13 = self.w13(experts, &cut, stored.suffix, form);
                    let w2 = self.w2(experts, &cut, stored.suffix, form);
                    if !stored.suffix.starts_with("weight_scale") {
                        (made.w13, made.w2) = (w13, w2);
                    }
                }
                Content::Scalar => self.expert_scalars(experts, &cut, stored.suffix),
                Content::Shape => self.expert_shapes(experts, &cut, stored.suffix),
            }
        }
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
        let (ep, moe_tp) = (
            u64::from(self.parallel.ep()),
            u64::from(self.parallel.moe_tp()),
        );
        let refuse = |found: String, expected: &str| {
            Err(PlanError::unsupported(
                experts.name.clone(),
                found,
                expected,
            ))
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
        let group = scheme.k_group();
        if (inner % group != 0) || (scheme != Scheme::Fp8 && experts.hidden % group != 0) {
            let found = format!("hidden {}, {inner} inner rows on a rank", experts.hidden);
            return refuse(
                found,
                &format!("both must be whole groups of {group} for {}", scheme.name()),
            );
        }
        let kernels = self.layout.kernels;
        let inner_padded = match (kernels, scheme) {
            (KernelLayout::Trtllm, Scheme::Bf16 | Scheme::Fp8 | Scheme::Nvfp4) => {
                inner.next_multiple_of(128)
            }
            (KernelLayout::Aiter, Scheme::Mxfp4) => inner.next_multiple_of(256),
            _ => inner,
        };
        let up_first = match kernels {
            KernelLayout::Trtllm => scheme != Scheme::Mxfp4,
            KernelLayout::FlashinferCutlass => matches!(scheme, Scheme::Bf16 | Scheme::Nvfp4),
            _ => false,
        };
        let fused = experts.sources.len() as u64 - experts.routed;
        let per_group = experts.routed / ep;
        Ok(ExpertCut {
            local: per_group + fused,
            per_group,
            inner_padded,
            up_first,
        })
    }

    /// The slot of expert `e` on its ranks, and those ranks.
    fn expert_home(&self, experts: &Experts, cut: &ExpertCut, e: u64) -> (u64, Members) {
        if e < experts.routed {
            let group = (e / cut.per_group) as u32;
            (
                e % cut.per_group,
                Members::expert_group(self.parallel, group),
            )
        } else {
            (
                cut.per_group + e - experts.routed,
                Members::every_group(self.parallel),
            )
        }
    }

    fn w13(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str, form: Matrix) -> ParamId {
        let cols = experts.hidden.div_ceil(form.col_unit);
        let (rows, per) = (
            experts.inner.div_ceil(form.row_unit),
            cut.inner_padded.div_ceil(form.row_unit),
        );
        let stride = cols * elem_bytes(form.dtype);
        let name = format!("{}.w13_{suffix}", experts.name);
        let param = self.param(name, form.dtype, vec![cut.local, 2 * per, cols]);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            for (half, projection) in cut.halves() {
                let tensor = format!("{module}.{projection}.{suffix}");
                let source = self.source(tensor, vec![rows, cols], form.accept, form.dtype);
                let at = (slot * 2 + half) * per * stride;
                self.piece(
                    source,
                    (0, rows),
                    Split::Rows { per },
                    members,
                    param,
                    at,
                    stride,
                );
            }
        }
        param
    }

    fn w2(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str, form: Matrix) -> ParamId {
        let rows = experts.hidden.div_ceil(form.row_unit);
        let (cols, per) = (
            experts.inner.div_ceil(form.col_unit),
            cut.inner_padded.div_ceil(form.col_unit),
        );
        let stride = per * elem_bytes(form.dtype);
        let name = format!("{}.w2_{suffix}", experts.name);
        let param = self.param(name, form.dtype, vec![cut.local, rows, per]);
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            let tensor = format!("{module}.down_proj.{suffix}");
            let source = self.source(tensor, vec![rows, cols], form.accept, form.dtype);
            let at = slot * rows * stride;
            self.piece(
                source,
                (0, rows),
                Split::Cols { per },
                members,
                param,
                at,
                stride,
            );
        }
        param
    }

    /// Per-tensor scalars of experts: `weight_scale_2` for the rank's own, `input_scale` for all (§3.5).
    fn expert_scalars(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str) {
        let all = suffix == "input_scale";
        let count = if all {
            experts.sources.len() as u64
        } else {
            cut.local
        };
        let w13 = self.param(
            format!("{}.w13_{suffix}", experts.name),
            Dtype::F32,
            vec![count, 2],
        );
        let w2 = self.param(
            format!("{}.w2_{suffix}", experts.name),
            Dtype::F32,
            vec![count],
        );
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
    }

    fn expert_shapes(&mut self, experts: &Experts, cut: &ExpertCut, suffix: &str) {
        let w13 = self.param(
            format!("{}.w13_{suffix}", experts.name),
            Dtype::I64,
            vec![cut.local, 2],
        );
        let w2 = self.param(
            format!("{}.w2_{suffix}", experts.name),
            Dtype::I64,
            vec![cut.local, 2],
        );
        for (e, module) in experts.sources.iter().enumerate() {
            let (slot, members) = self.expert_home(experts, cut, e as u64);
            let split = Split::Rows { per: 2 };
            for (projection, param) in [("gate_proj", w13), ("down_proj", w2)] {
                let source = self.shape_source(format!("{module}.{projection}.{suffix}"));
                self.piece(source, (0, 2), split, members.whole(), param, slot * 16, 8);
            }
            let up = self.shape_source(format!("{module}.up_proj.{suffix}"));
            self.out
                .unplaced
                .push((up, "the gate's shape counts for the fused weight"));
        }
    }
}

/// What [`Declare::linear`] made.
#[derive(Debug, Clone, Copy)]
pub struct LinearParams {
    /// How the layer is stored.
    pub scheme: Scheme,
    /// The weight's parameter.
    pub weight: ParamId,
    /// The block scale's parameter, if the scheme has one.
    pub scale: Option<ParamId>,
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
    /// Experts on one rank.
    pub local: u64,
    /// Rows of one half of w13 on a rank, padding included.
    pub inner: u64,
}

/// How the weights of one linear part are laid out in its tensors.
#[derive(Clone, Copy)]
struct Matrix {
    row_unit: u64,
    col_unit: u64,
    dtype: Dtype,
    accept: Accept,
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

/// Rows of a tensor seen as a matrix: the first dimension, 1 for a scalar.
pub fn rows_of(shape: &[u64]) -> u64 {
    shape.first().copied().unwrap_or(1)
}
