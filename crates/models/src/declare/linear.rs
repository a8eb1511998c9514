//! Linear layers: fused from parts, cut along output or input, with all tensors of their scheme.
//!
//! Source: reference §3.2; contract §4, "refused with exit 2".

use crate::{
    declare::{Accept, Declare, ParamId, Split, finish},
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    parallel::Members,
    quant::{Content, Scheme, Stored},
};

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

/// What [`Declare::linear`] made.
#[derive(Debug, Clone, Copy)]
pub struct LinearParams {
    /// How the layer is stored.
    pub scheme: Scheme,
    /// The weight's parameter.
    pub weight: ParamId,
    /// The block scale's parameter, if the scheme has one.
    pub scale: Option<ParamId>,
    /// The parameters of per-tensor scalars in the scheme's order, if it has any.
    pub scalars: Scalars,
    /// Output rows on one rank, padding not counted.
    pub rows: u64,
    /// Input elements on one rank, padding not counted.
    pub k: u64,
}

/// The parameters of a scheme's per-tensor scalars.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scalars {
    /// `weight_scale_2`.
    pub scale_2: ParamId,
    /// `input_scale`.
    pub input_scale: ParamId,
}

impl Scalars {
    pub(super) fn set(&mut self, suffix: &str, param: ParamId) {
        match suffix {
            "input_scale" => self.input_scale = param,
            _ => self.scale_2 = param,
        }
    }
}

/// How the weights of one linear part are laid out in its tensors.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) row_unit: u64,
    pub(super) col_unit: u64,
    pub(super) dtype: Dtype,
    pub(super) accept: Accept,
    /// What rows and elements of K are rounded up to in the parameter; the rest is zero.
    pub(super) pad: (u64, u64),
}

impl Declare<'_> {
    /// A part whose rows are cut evenly over all ranks.
    ///
    /// # Errors
    /// tp does not divide the rows.
    pub fn column(&self, source: String, rows: u64) -> Result<Part, PlanError> {
        let tp = u64::from(self.parallel.tp());
        if rows % tp != 0 {
            let found = format!("{rows} output rows, tp {tp}");
            return Err(PlanError::unsupported(source, found, "tp must divide the output rows"));
        }
        Ok(Part { source, rows, per: rows / tp, members: Members::split(self.parallel, 1) })
    }

    /// A part that every rank holds in full.
    pub fn whole(&self, source: String, rows: u64) -> Part {
        Part { source, rows, per: rows, members: Members::replicated(self.parallel) }
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
            return Err(PlanError::unsupported(q, found, "tp must divide num_attention_heads"));
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
            scalars: Scalars::default(),
            rows: parts.iter().map(|p| p.per).sum(),
            k: match input {
                Input::Whole => k,
                Input::Split => k / u64::from(self.parallel.tp()),
            },
        };
        for stored in scheme.stored() {
            let full = format!("{name}.{}", stored.suffix);
            match stored.content {
                Content::Matrix { row_unit, col_unit } => {
                    let mut form = self.form(scheme, stored, row_unit, col_unit);
                    if !stored.is_scale() {
                        form.pad = finish::linear_padding(scheme, self.layout.kernels);
                    }
                    let param = self.matrix(full, stored.suffix, parts, k, input, form);
                    if stored.is_scale() {
                        made.scale = Some(param);
                    } else {
                        made.weight = param;
                    }
                }
                Content::Scalar => {
                    let param = self.linear_scalars(full, stored.suffix, parts, slots);
                    made.scalars.set(stored.suffix, param);
                }
                Content::Shape => self.linear_shape(full, stored.suffix, parts),
            }
        }
        self.bias(name, parts, input);
        finish::linear(self, name, &made);
        Ok(made)
    }

    /// How a stored matrix becomes a parameter; an unquantised weight takes the model's dtype.
    pub(super) fn form(
        &self,
        scheme: Scheme,
        stored: &Stored,
        row_unit: u64,
        col_unit: u64,
    ) -> Matrix {
        let dtype = if scheme == Scheme::Bf16 { self.dtype } else { stored.dtype };
        let accept = if stored.float { Accept::AnyFloat } else { Accept::Exactly(stored.dtype) };
        Matrix { row_unit, col_unit, dtype, accept, pad: (1, 1) }
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
        // both units divide what they are padded to: packed weights have a row unit of 1, and pad K to 32 or 64
        let padded_cols = (per_cols * form.col_unit).next_multiple_of(form.pad.1) / form.col_unit;
        let stride = padded_cols * elem_bytes(form.dtype);
        let shape = vec![rows.next_multiple_of(form.pad.0), padded_cols];
        let param = self.param(name, form.dtype, shape);
        self.param_mut(param).filled_bytes = rows * stride;
        let mut at = 0;
        for part in parts {
            let stored_rows = part.rows.div_ceil(form.row_unit);
            let tensor = format!("{}.{suffix}", part.source);
            let source = self.source(tensor, vec![stored_rows, cols], form.accept, form.dtype);
            let (split, members) = match input {
                Input::Whole => (Split::Rows { per: stored_per(part) }, part.members),
                Input::Split => (Split::Cols { per: per_cols }, Members::split(self.parallel, 1)),
            };
            self.piece(source, (0, stored_rows), split, members, param, at, stride);
            at += stored_per(part) * stride;
        }
        param
    }

    fn linear_scalars(
        &mut self,
        name: String,
        suffix: &str,
        parts: &[Part],
        slots: Slots,
    ) -> ParamId {
        let count = if slots == Slots::First { 1 } else { parts.len() as u64 };
        let param = self.param(name, Dtype::F32, vec![count]);
        let mut first = None;
        for (i, part) in parts.iter().enumerate() {
            let source = self.scalar(format!("{}.{suffix}", part.source));
            let first = *first.get_or_insert(source);
            if (i as u64) < count {
                self.slot(source, Members::replicated(self.parallel), param, i as u64);
            } else {
                self.out.discarded.push((first, source));
                self.out
                    .unplaced
                    .push((source, "the first part's scalar counts for the fused layer"));
            }
        }
        param
    }

    fn linear_shape(&mut self, name: String, suffix: &str, parts: &[Part]) {
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
    pub(super) fn common_scheme<'m>(
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
                _ => format!("K / tp must be whole groups of {group} for {}", scheme.name()),
            };
            return Err(PlanError::unsupported(name, found, expected));
        }
        if scheme != Scheme::Fp8 || input == Input::Split {
            return Ok(());
        }
        let replicated = parts.iter().all(|p| p.per == p.rows && p.members.parts() == 1);
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
}
