//! The declaration of a model: which parameters it has, which tensors they are made of, and how both are cut.
//!
//! A family (`arch/*.rs`) says in the vocabulary of [`Declare`] what its layers are; schemes (`quant.rs`) say how one
//! linear layer is stored. Both meet here, so a new family knows nothing of schemes and a new scheme nothing of
//! families. A declaration names tensors that ought to exist; [`crate::placement`] matches it with a checkpoint, and
//! `synth` writes a checkpoint from it.

pub mod experts;
mod finish;
pub mod linear;

use crate::{
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    options::Layout,
    parallel::{Members, Parallel},
    quant::Scheme,
    transform::Finish,
};

/// Index of a parameter in [`Declaration::params`].
pub type ParamId = u32;

/// A runtime parameter; names, dtypes and shapes are the same on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Scalars that are kept, each with one that is `unplaced` in its favour: they had better be equal.
    pub discarded: Vec<(u32, u32)>,
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
    pub(crate) lookup: &'a dyn Lookup,
    pub(crate) out: Declaration,
}

impl std::fmt::Debug for Declare<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Declare").field("params", &self.out.params.len()).finish_non_exhaustive()
    }
}

impl<'a> Declare<'a> {
    /// Starts an empty declaration.
    pub fn new(parallel: Parallel, layout: Layout, dtype: Dtype, lookup: &'a dyn Lookup) -> Self {
        Self { parallel, layout, dtype, layer: None, lookup, out: Declaration::default() }
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
        self.piece(source, (0, rows), Split::Rows { per: rows }, members, param, 0, row_bytes);
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
        self.piece(source, (0, v), Split::Rows { per }, members, param, 0, stride);
        Ok(param)
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
        self.out.params.push(Param { name, dtype, shape, bytes, filled_bytes, layer, derived });
        self.out.params.len() as ParamId - 1
    }

    /// The parameter that was added last.
    pub fn last_param(&self) -> ParamId {
        self.out.params.len() as ParamId - 1
    }

    /// A parameter that was added.
    pub fn param_mut(&mut self, param: ParamId) -> &mut Param {
        &mut self.out.params[param as usize]
    }

    /// Adds a second name for a parameter.
    pub fn alias(&mut self, name: impl Into<String>, source: ParamId) {
        self.out.aliases.push(Alias { name: name.into(), source });
    }

    /// Adds work to do once parameters are complete.
    pub fn after(&mut self, finish: Finish) {
        self.out.finishes.push(finish);
    }

    /// Adds a tensor that ought to exist.
    pub fn source(&mut self, name: String, shape: Vec<u64>, accept: Accept, usual: Dtype) -> u32 {
        self.out.sources.push(Source { name, shape, accept, usual });
        self.out.sources.len() as u32 - 1
    }

    pub(crate) fn scalar(&mut self, name: String) -> u32 {
        self.source(name, Vec::new(), Accept::AnyFloat, Dtype::F32)
    }

    pub(crate) fn shape_source(&mut self, name: String) -> u32 {
        self.source(name, vec![2], Accept::AnyInt, Dtype::I64)
    }

    /// A scalar that lands in slot `slot` of an F32 parameter.
    pub(crate) fn slot(&mut self, source: u32, members: Members, param: ParamId, slot: u64) {
        self.piece(source, (0, 1), Split::Rows { per: 1 }, members, param, slot * 4, 4);
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a piece, in order")]
    pub(crate) fn piece(
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
}

/// Rows of a tensor seen as a matrix: the first dimension, 1 for a scalar.
pub fn rows_of(shape: &[u64]) -> u64 {
    shape.first().copied().unwrap_or(1)
}
