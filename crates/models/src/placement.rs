//! Placement: for every runtime parameter of every rank, exactly which source bytes land where.
//!
//! A [`Placement`] is a declaration matched with a checkpoint and proven: every needed tensor is there, once, with the
//! right shape and dtype; every byte of every parameter is written by exactly one piece. It is linear in the number of
//! tensors: the spans of one rank are computed when they are asked for ([`Placement::spans`]), never stored.

mod closed;
mod lookup;
mod related;
mod span;
mod validate;

use crate::{
    arch::Model,
    byte_range::ByteRange,
    checkpoint::{Checkpoint, Tensor, TensorId},
    declare::{Accept, Alias, Declaration, Param, ParamId, Source, Split, rows_of},
    dtype::{Dtype, elem_bytes},
    error::PlanError,
    options::Layout,
    parallel::{Members, Parallel},
    transform::Finish,
};

use self::lookup::Names;
pub use self::span::Span;

/// A tensor that no rank needs, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// The tensor.
    pub tensor: TensorId,
    /// Why it is left where it is.
    pub why: &'static str,
}

/// A rectangle of one tensor that lands in one parameter of each member rank; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedPiece {
    /// The parameter.
    pub param: ParamId,
    /// The tensor's element type.
    pub from: Dtype,
    /// The parameter's element type.
    pub to: Dtype,
    /// Bytes of one row of the tensor.
    pub row_bytes: u64,
    /// The rows of the tensor that belong to this piece.
    pub rows: (u64, u64),
    /// How they are cut; `Cols.per` is in source bytes here.
    pub split: Split,
    /// Who holds which part.
    pub members: Members,
    /// First byte within the parameter.
    pub target_offset: u64,
    /// Bytes from one row to the next within the parameter.
    pub target_stride: u64,
}

/// Everything that a group of ranks has to bring about.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The group.
    pub parallel: Parallel,
    /// The kernels that the parameters end in.
    pub layout: Layout,
    /// The parameters; the same on every rank.
    pub params: Vec<Param>,
    /// What is computed once parameters are complete.
    pub finishes: Vec<Finish>,
    /// Second names.
    pub aliases: Vec<Alias>,
    /// Tensors that no rank needs.
    pub skipped: Vec<Skipped>,
    /// Scalars that are kept, each with one that is skipped in its favour.
    pub discarded: Vec<(TensorId, TensorId)>,
    /// What looked odd but did no harm.
    pub warnings: Vec<String>,
    /// All pieces, ordered by tensor.
    pieces: Vec<PlacedPiece>,
    /// `pieces[first_piece[t]..first_piece[t + 1]]` are those of tensor `t`.
    first_piece: Vec<u32>,
}

impl Placement {
    /// Matches a model with a checkpoint and proves the result.
    ///
    /// # Errors
    /// Anything that would leave a parameter incomplete or a tensor unexplained: missing, unknown or doubly supplied
    /// tensors, wrong shapes and dtypes, dimensions that cannot be cut.
    pub fn new(
        model: &Model,
        checkpoint: &Checkpoint,
        parallel: Parallel,
    ) -> Result<Self, PlanError> {
        let names = Names::new(model, checkpoint)?;
        let declaration = model.declare(parallel, &names)?;
        let mut warnings = names.check_schemes()?;
        let matched = match_sources(&declaration, &names, checkpoint)?;
        let (skipped, unknown) = explain_rest(model, checkpoint, &names, &declaration, &matched)?;
        warnings.extend(unknown);
        let (pieces, first_piece) = place(&declaration, &matched, checkpoint);
        let tensor = |source: u32| matched[source as usize];
        let discarded = declaration.discarded.iter().map(|&(a, b)| (tensor(a), tensor(b)));
        let discarded = discarded.collect();
        let Declaration { params, finishes, aliases, .. } = declaration;
        let this = Self {
            parallel,
            layout: model.layout,
            params,
            finishes,
            aliases,
            skipped,
            discarded,
            warnings,
            pieces,
            first_piece,
        };
        validate::check(&this, checkpoint)?;
        Ok(this)
    }

    /// What a rank holds that is in the group and has no part of the model: nothing.
    pub fn nothing(&self) -> Self {
        Self {
            parallel: self.parallel,
            layout: self.layout,
            params: Vec::new(),
            finishes: Vec::new(),
            aliases: Vec::new(),
            skipped: Vec::new(),
            discarded: Vec::new(),
            warnings: Vec::new(),
            pieces: Vec::new(),
            first_piece: vec![0; self.first_piece.len()],
        }
    }

    /// For each parameter whether its bytes stay as they were read: no finish reads or writes it, no second name shares it.
    pub fn unchanged(&self) -> Vec<bool> {
        let mut unchanged: Vec<bool> = self.params.iter().map(|param| !param.derived).collect();
        let finishes = self.finishes.iter();
        let touched =
            finishes.flat_map(|finish| finish.inputs().into_iter().chain(finish.outputs()));
        for param in touched.chain(self.aliases.iter().map(|alias| alias.source)) {
            unchanged[param as usize] = false;
        }
        unchanged
    }

    /// The pieces that a tensor's bytes land in; empty for a tensor that is skipped.
    pub fn pieces_of(&self, tensor: TensorId) -> &[PlacedPiece] {
        let t = tensor as usize;
        &self.pieces[self.first_piece[t] as usize..self.first_piece[t + 1] as usize]
    }

    /// All pieces, ordered by tensor.
    pub fn pieces(&self) -> &[PlacedPiece] {
        &self.pieces
    }

    /// Bytes of checkpoint data that any rank needs, each counted once.
    pub fn needed_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let needed = |(t, tensor): (usize, &Tensor)| {
            if self.pieces_of(t as TensorId).is_empty() { 0 } else { tensor.file_range.len() }
        };
        checkpoint.tensors.iter().enumerate().map(needed).sum()
    }

    /// Bytes of the parameters that one rank holds; aliases count nothing.
    pub fn parameter_bytes(&self) -> u64 {
        self.params.iter().map(|p| p.bytes).sum()
    }

    /// How many bytes pieces will write into each parameter of `rank`; 0 for derived ones.
    pub fn landing_bytes(&self, rank: u32) -> Vec<u64> {
        let mut bytes = vec![0; self.params.len()];
        for piece in &self.pieces {
            if let Some(part) = piece.members.part(rank) {
                bytes[piece.param as usize] += piece.part_target_bytes(part);
            }
        }
        bytes
    }

    /// Calls `each` with every range of a parameter of `rank` that is reserved but written by no piece: rows that are
    /// clipped, columns and rows of padding. Derived parameters have none.
    pub fn padding(&self, rank: u32, mut each: impl FnMut(ParamId, ByteRange)) {
        for piece in &self.pieces {
            if let Some(part) = piece.members.part(rank) {
                piece.padding(part, |range| each(piece.param, range));
            }
        }
        for (id, param) in self.params.iter().enumerate().filter(|(_, p)| !p.derived) {
            if param.filled_bytes < param.bytes {
                each(id as ParamId, ByteRange::new(param.filled_bytes, param.bytes));
            }
        }
    }

    /// Makes sure that `other` fills the same parameters for the same kernels, so that it may be written into the
    /// memory of this one.
    ///
    /// # Errors
    /// The first parameter that differs, with what it is here and there.
    pub fn same_parameters(&self, other: &Placement) -> Result<(), PlanError> {
        let differs = |param: &str, found: String, expected: String| {
            Err(PlanError::OtherParameters { param: param.into(), found, expected })
        };
        if self.parallel != other.parallel {
            let text = |p: Parallel| format!("tp {} ep {}", p.tp(), p.ep());
            return differs("(group)", text(other.parallel), text(self.parallel));
        }
        if self.layout != other.layout {
            let text = |l: Layout| match l.derive {
                true => format!("kernel layout {}", l.kernels),
                false => "an explicit kernel layout none".to_owned(),
            };
            return differs("(kernel layout)", text(other.layout), text(self.layout));
        }
        let form = |p: &Param| format!("{} {:?}", p.dtype, p.shape);
        let none = || "no such parameter".to_owned();
        for i in 0..self.params.len().max(other.params.len()) {
            match (self.params.get(i), other.params.get(i)) {
                // whether it is read or derived does not matter: the memory is the same
                (Some(a), Some(b)) if a.name == b.name => {
                    if (a.dtype, &a.shape, a.bytes) != (b.dtype, &b.shape, b.bytes) {
                        return differs(&a.name, form(b), form(a));
                    }
                }
                (Some(a), _) if !other.params.iter().any(|b| b.name == a.name) => {
                    return differs(&a.name, none(), form(a));
                }
                (_, Some(b)) => return differs(&b.name, form(b), none()),
                (Some(a), None) => return differs(&a.name, none(), form(a)),
                (None, None) => {}
            }
        }
        if self.aliases != other.aliases {
            let text = |p: &Placement| format!("{} aliases", p.aliases.len());
            return differs("(aliases)", text(other), text(self));
        }
        Ok(())
    }

    /// Calls `each` with every span that `range` of `tensor` contributes to the ranks that `wanted` accepts.
    ///
    /// `range` is relative to the tensor and cuts no element. Offsets in the spans are relative to `range.start`.
    pub fn spans(
        &self,
        tensor: TensorId,
        range: ByteRange,
        wanted: impl Fn(u32) -> bool,
        mut each: impl FnMut(Span),
    ) {
        for piece in self.pieces_of(tensor) {
            for rank in piece.members.ranks().filter(|&r| wanted(r)) {
                if let Some(part) = piece.members.part(rank) {
                    piece.spans(rank, part, range, &mut each);
                }
            }
        }
    }
}

impl PlacedPiece {
    /// The rows and the bytes of each row that part `part` covers.
    pub fn part_rect(&self, part: u32) -> ((u64, u64), (u64, u64)) {
        let part = u64::from(part);
        match self.split {
            Split::Rows { per } => {
                let first = (self.rows.0 + part * per).min(self.rows.1);
                ((first, (first + per).min(self.rows.1)), (0, self.row_bytes))
            }
            Split::Cols { per } => {
                let first = (part * per).min(self.row_bytes);
                (self.rows, (first, (first + per).min(self.row_bytes)))
            }
        }
    }

    /// What part `part` covers of `range` of the tensor: from the first byte to the last, with whatever lies between.
    pub fn extent_in(&self, part: u32, range: ByteRange) -> Option<ByteRange> {
        let ((r0, r1), (c0, c1)) = self.part_rect(part);
        if r0 >= r1 || c0 >= c1 || range.is_empty() {
            return None;
        }
        let row_bytes = self.row_bytes;
        let (row, col) = (range.start / row_bytes, range.start % row_bytes);
        let start = match row {
            _ if row < r0 => r0 * row_bytes + c0,
            _ if col < c1 => row * row_bytes + col.max(c0),
            _ => (row + 1) * row_bytes + c0,
        };
        // the row that holds the last byte, and the bytes of it that are in the range
        let (row, cols) = ((range.end - 1) / row_bytes, (range.end - 1) % row_bytes + 1);
        let end = match row {
            _ if row >= r1 => (r1 - 1) * row_bytes + c1,
            _ if cols > c0 => row * row_bytes + cols.min(c1),
            0 => return None,
            _ => (row - 1) * row_bytes + c1,
        };
        (start < end && start < (r1 - 1) * row_bytes + c1 && end > r0 * row_bytes + c0)
            .then(|| ByteRange::new(start, end))
    }

    /// How many bytes part `part` covers of `range` of the tensor.
    pub fn bytes_in(&self, part: u32, range: ByteRange) -> u64 {
        let mut bytes = 0;
        self.spans(0, part, range, &mut |span| bytes += span.source_bytes());
        bytes
    }

    /// Bytes of the tensor that part `part` covers.
    pub fn part_bytes(&self, part: u32) -> u64 {
        let ((r0, r1), (c0, c1)) = self.part_rect(part);
        (r1 - r0) * (c1 - c0)
    }

    fn part_target_bytes(&self, part: u32) -> u64 {
        self.target_bytes(self.part_bytes(part))
    }

    /// Parameter bytes that `source` bytes of the tensor become.
    pub fn target_bytes(&self, source: u64) -> u64 {
        if self.from == self.to {
            return source;
        }
        source / elem_bytes(self.from) * elem_bytes(self.to)
    }

    /// Calls `each` with the ranges of the parameter that are reserved for `part` but not written by it.
    fn padding(&self, part: u32, mut each: impl FnMut(ByteRange)) {
        let ((r0, r1), (c0, c1)) = self.part_rect(part);
        let width = self.target_bytes(c1 - c0);
        let written_rows = if width == 0 { 0 } else { r1 - r0 };
        if width < self.target_stride {
            for row in 0..written_rows {
                let start = self.target_offset + row * self.target_stride;
                each(ByteRange::new(start + width, start + self.target_stride));
            }
        }
        let written = self.target_offset + written_rows * self.target_stride;
        let reserved = self.target_offset + self.reserved_bytes();
        if written < reserved {
            each(ByteRange::new(written, reserved));
        }
    }

    /// Bytes of the parameter that are reserved for one part, clipped or not.
    fn reserved_bytes(&self) -> u64 {
        let rows = match self.split {
            Split::Rows { per } => per,
            Split::Cols { .. } => self.rows.1 - self.rows.0,
        };
        rows * self.target_stride
    }
}

/// The tensor of each source; checks shape and dtype.
fn match_sources(
    declaration: &Declaration,
    names: &Names<'_>,
    checkpoint: &Checkpoint,
) -> Result<Vec<TensorId>, PlanError> {
    let mut matched = Vec::with_capacity(declaration.sources.len());
    for (number, source) in declaration.sources.iter().enumerate() {
        let Some(id) = names.tensor(&source.name) else {
            let param = wanting_param(declaration, number as u32);
            return Err(PlanError::MissingTensor { tensor: source.name.clone(), param });
        };
        check_form(source, &checkpoint.tensors[id as usize], checkpoint)?;
        matched.push(id);
    }
    Ok(matched)
}

fn wanting_param(declaration: &Declaration, source: u32) -> String {
    let piece = declaration.pieces.iter().find(|p| p.source == source);
    piece.map_or_else(
        || "of its fused layer".to_owned(),
        |p| declaration.params[p.param as usize].name.clone(),
    )
}

fn check_form(source: &Source, tensor: &Tensor, checkpoint: &Checkpoint) -> Result<(), PlanError> {
    let scalar = source.shape.is_empty() && tensor.shape == [1];
    if tensor.shape != source.shape && !scalar {
        return Err(PlanError::WrongShape {
            file: checkpoint.file_name(tensor).into(),
            tensor: tensor.name.clone(),
            expected: source.shape.clone(),
            found: tensor.shape.clone(),
        });
    }
    let (fits, expected) = match source.accept {
        Accept::Exactly(dtype) => (tensor.dtype == dtype, dtype.to_string()),
        Accept::AnyFloat => (
            matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64),
            "BF16, F16, F32 or F64".to_owned(),
        ),
        Accept::AnyInt => {
            (matches!(tensor.dtype, Dtype::I32 | Dtype::I64), "I64 or I32".to_owned())
        }
    };
    if fits {
        return Ok(());
    }
    Err(PlanError::WrongDtype {
        file: checkpoint.file_name(tensor).into(),
        tensor: tensor.name.clone(),
        expected,
        found: tensor.dtype,
    })
}

/// Every tensor that nothing matched must have a reason to be there.
fn explain_rest(
    model: &Model,
    checkpoint: &Checkpoint,
    names: &Names<'_>,
    declaration: &Declaration,
    matched: &[TensorId],
) -> Result<(Vec<Skipped>, Vec<String>), PlanError> {
    let mut used = vec![false; checkpoint.tensors.len()];
    for &id in matched {
        used[id as usize] = true;
    }
    let mut skipped: Vec<Skipped> = declaration
        .unplaced
        .iter()
        .map(|&(source, why)| Skipped { tensor: matched[source as usize], why })
        .collect();
    let mut warnings = Vec::new();
    for (id, tensor) in checkpoint.tensors.iter().enumerate().filter(|(id, _)| !used[*id]) {
        let tensor_id = id as TensorId;
        if let Some(why) = model.skip_reason(names.canonical(tensor_id)) {
            skipped.push(Skipped { tensor: tensor_id, why });
        } else if model.options.allow_unknown {
            skipped.push(Skipped { tensor: tensor_id, why: "unknown; allowed by --allow-unknown" });
            warnings.push(format!("tensor {} belongs to no parameter and is skipped", tensor.name));
        } else {
            return Err(PlanError::UnknownTensor {
                file: checkpoint.file_name(tensor).into(),
                tensor: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                family: model.family.name().into(),
            });
        }
    }
    skipped.sort_by_key(|s| s.tensor);
    Ok((skipped, warnings))
}

/// Pieces in units of bytes, ordered by tensor.
fn place(
    declaration: &Declaration,
    matched: &[TensorId],
    checkpoint: &Checkpoint,
) -> (Vec<PlacedPiece>, Vec<u32>) {
    let tensor_of = |p: &crate::declare::Piece| matched[p.source as usize];
    let mut order: Vec<u32> = (0..declaration.pieces.len() as u32).collect();
    order.sort_by_key(|&i| tensor_of(&declaration.pieces[i as usize]));
    let mut first_piece = vec![0u32; checkpoint.tensors.len() + 1];
    let mut pieces = Vec::with_capacity(order.len());
    for i in order {
        let piece = &declaration.pieces[i as usize];
        let id = tensor_of(piece) as usize;
        let tensor = &checkpoint.tensors[id];
        let elem = elem_bytes(tensor.dtype);
        let split = match piece.split {
            Split::Cols { per } => Split::Cols { per: per * elem },
            rows => rows,
        };
        pieces.push(PlacedPiece {
            param: piece.param,
            from: tensor.dtype,
            to: declaration.params[piece.param as usize].dtype,
            row_bytes: tensor.file_range.len() / rows_of(&tensor.shape).max(1),
            rows: piece.rows,
            split,
            members: piece.members,
            target_offset: piece.target_offset,
            target_stride: piece.target_stride,
        });
        first_piece[id + 1] += 1;
    }
    for t in 1..first_piece.len() {
        first_piece[t] += first_piece[t - 1];
    }
    (pieces, first_piece)
}
