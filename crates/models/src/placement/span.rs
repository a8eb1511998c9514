//! Spans: the strided copies that a range of a tensor's bytes turns into.

use crate::{
    byte_range::ByteRange,
    declare::ParamId,
    dtype::{Dtype, elem_bytes},
    placement::PlacedPiece,
};

/// `rows` runs of `width` source bytes, `source_stride` apart, that land `target_stride` apart in one parameter.
///
/// ```text
/// source  ..[width]......[width]......[width]..     source_stride from one [ to the next
/// target  [width·][width·][width·]                  target_stride; width· is width after conversion
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The rank whose parameter it is.
    pub rank: u32,
    /// The parameter.
    pub param: ParamId,
    /// First source byte, relative to the range that was asked for.
    pub source_offset: u64,
    /// First byte within the parameter.
    pub target_offset: u64,
    /// Number of runs.
    pub rows: u64,
    /// Source bytes of one run.
    pub width: u64,
    /// Source bytes from one run to the next; meaningless when `rows` is 1.
    pub source_stride: u64,
    /// Parameter bytes from one run to the next; meaningless when `rows` is 1.
    pub target_stride: u64,
    /// Element types when they differ: the tensor's, the parameter's.
    pub cast: Option<(Dtype, Dtype)>,
}

impl Span {
    /// Source bytes that the span moves.
    pub fn source_bytes(&self) -> u64 {
        self.rows * self.width
    }

    /// Parameter bytes that one run writes.
    pub fn target_width(&self) -> u64 {
        match self.cast {
            None => self.width,
            Some((from, to)) => self.width / elem_bytes(from) * elem_bytes(to),
        }
    }

    /// Parameter bytes that the span writes.
    pub fn target_bytes(&self) -> u64 {
        self.rows * self.target_width()
    }
}

impl PlacedPiece {
    /// Calls `each` with the spans that `range` of the tensor contributes to part `part`, held by `rank`.
    pub(super) fn spans(
        &self,
        rank: u32,
        part: u32,
        range: ByteRange,
        each: &mut impl FnMut(Span),
    ) {
        let ((r0, r1), (c0, c1)) = self.part_rect(part);
        if r0 >= r1 || c0 >= c1 {
            return;
        }
        let cut = Cut { piece: self, rank, first_row: r0, first_col: c0, range };
        if c0 == 0 && c1 == self.row_bytes && self.target_bytes(c1) == self.target_stride {
            let whole = ByteRange::new(r0 * self.row_bytes, r1 * self.row_bytes);
            if let Some(run) = whole.intersect(&range) {
                each(cut.run(run.start, run.len()));
            }
            return;
        }
        cut.rows(r1, c1, each);
    }
}

/// One part of one piece against one range.
struct Cut<'a> {
    piece: &'a PlacedPiece,
    rank: u32,
    first_row: u64,
    first_col: u64,
    range: ByteRange,
}

impl Cut<'_> {
    /// A single run that starts at source byte `start` (relative to the tensor).
    fn run(&self, start: u64, width: u64) -> Span {
        let p = self.piece;
        let (row, col) = (start / p.row_bytes, start % p.row_bytes);
        Span {
            rank: self.rank,
            param: p.param,
            source_offset: start - self.range.start,
            target_offset: p.target_offset
                + (row - self.first_row) * p.target_stride
                + p.target_bytes(col - self.first_col),
            rows: 1,
            width,
            source_stride: p.row_bytes,
            target_stride: p.target_stride,
            cast: (p.from != p.to).then_some((p.from, p.to)),
        }
    }

    /// Rows `first_row..r1`, bytes `first_col..c1` of each: the rows that lie whole in the range as one span, the
    /// (at most two) rows that its ends cut each as one of their own.
    fn rows(&self, r1: u64, c1: u64, each: &mut impl FnMut(Span)) {
        let (a, b, row_bytes) = (self.range.start, self.range.end, self.piece.row_bytes);
        let low = self.first_row.max(a / row_bytes);
        let high = r1.min(b.div_ceil(row_bytes));
        let mut row = low;
        while row < high {
            let (start, end) = (row * row_bytes + self.first_col, row * row_bytes + c1);
            let (from, to) = (start.max(a), end.min(b));
            if from < to && (from, to) != (start, end) {
                each(self.run(from, to - from));
            } else if from < to {
                // the last row that ends within the range
                let last = (b.saturating_sub(c1) / row_bytes).min(high - 1);
                each(Span { rows: last - row + 1, ..self.run(start, c1 - self.first_col) });
                row = last;
            }
            row += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        declare::Split,
        parallel::{Members, Parallel},
    };

    /// What a piece does, said naively: byte `i` of the tensor lands at these target bytes.
    fn naive(piece: &PlacedPiece, part: u32) -> Vec<(u64, u64)> {
        let ((r0, r1), (c0, c1)) = piece.part_rect(part);
        let mut out = Vec::new();
        for r in r0..r1 {
            for c in c0..c1 {
                let at = piece.target_offset + (r - r0) * piece.target_stride + (c - c0);
                out.push((r * piece.row_bytes + c, at));
            }
        }
        out
    }

    fn spanned(piece: &PlacedPiece, part: u32, range: ByteRange) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        piece.spans(0, part, range, &mut |s| {
            for row in 0..s.rows {
                for i in 0..s.width {
                    let from = range.start + s.source_offset + row * s.source_stride + i;
                    out.push((from, s.target_offset + row * s.target_stride + i));
                }
            }
        });
        out.sort_unstable();
        out
    }

    proptest::proptest! {
        /// Whatever the range, the spans move exactly the bytes of the rectangle that lie in it.
        #[test]
        fn spans_equal_the_naive_rectangle(
            rows in 1u64..9, row_bytes in 1u64..12, per in 1u64..12, part in 0u32..4,
            by_rows: bool, pad in 0u64..4, cut in (0u64..100, 0u64..100),
        ) {
            let p = Parallel::new(4, 1).unwrap();
            let split = if by_rows { Split::Rows { per } } else { Split::Cols { per } };
            let width = if by_rows { row_bytes } else { per };
            let piece = PlacedPiece {
                param: 0, from: Dtype::U8, to: Dtype::U8, row_bytes, rows: (0, rows), split,
                members: Members::split(p, 1), target_offset: 7, target_stride: width + pad,
            };
            let total = rows * row_bytes;
            let (a, b) = (cut.0 % (total + 1), cut.1 % (total + 1));
            let range = ByteRange::new(a.min(b), a.max(b));
            let mut want = naive(&piece, part);
            want.retain(|(from, _)| (range.start..range.end).contains(from));
            want.sort_unstable();
            let extent = want.first().zip(want.last());
            let extent = extent.map(|(first, last)| ByteRange::new(first.0, last.0 + 1));
            proptest::prop_assert_eq!(piece.extent_in(part, range), extent);
            proptest::prop_assert_eq!(piece.bytes_in(part, range), want.len() as u64);
            proptest::prop_assert_eq!(spanned(&piece, part, range), want);
        }
    }
}
