//! BLK: a matrix cut into blocks of columns. Source: reference §4.0, §4g.
//!
//! ```text
//! rows ordered            groups of 32 rows cut           their pieces sorted by block
//! [rows, row_bytes]  ──►  [rows/32, blocks, 32·128]  ──►  [blocks, rows/32, 32·128]
//! ```
//!
//! Three passes in place, each over long pieces (rows, a group that stays in the second-level cache, 4 KiB), instead of one
//! through a copy of the matrix by pieces of 128 bytes: as fast or faster, and the workspace of a BF16 expert of DeepSeek-V3
//! is 448 KiB, not 56 MiB.

use crate::host::rows::permute_rows;

/// Bytes of a row within a block.
pub const BLOCK_BYTES: usize = 128;
/// Rows of a group, or the largest power of two that divides `rows`: 448 KiB of rows of 14336 bytes.
const GROUP_ROWS_MAX: usize = 32;

/// `[rows, row_bytes]` → `[row_bytes/128, rows, 128]`, in place; row `i` of the result is row `order(i)` of the source.
///
/// `workspace` grows to 32 rows, or to a row and a bit per row where that is more; it can be reused.
///
/// # Panics
/// When `matrix` is not `rows · row_bytes` bytes or a row is no whole number of blocks. An order that is no permutation
/// panics, or gives some rows twice.
pub fn into_blocks(
    matrix: &mut [u8],
    rows: usize,
    row_bytes: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    assert_eq!(matrix.len(), rows * row_bytes, "matrix size");
    assert_eq!(row_bytes % BLOCK_BYTES, 0, "rows must be whole blocks");
    if matrix.is_empty() {
        return;
    }
    let group = (1 << rows.trailing_zeros()).min(GROUP_ROWS_MAX);
    let (groups, blocks) = (rows / group, row_bytes / BLOCK_BYTES);
    // SHUF32, say, moves rows only within groups: then they need no pass of their own
    let stays = (0..rows).all(|i| order(i) / group == i / group);
    if !stays {
        permute_rows(matrix, row_bytes, rows, &order, workspace);
    }
    for (number, rows) in matrix.chunks_exact_mut(group * row_bytes).enumerate() {
        let first = number * group;
        let order = |i| if stays { order(first + i) - first } else { i };
        cut_group(rows, group, order, workspace);
    }
    let piece = |at: usize| at % groups * blocks + at / groups;
    permute_rows(matrix, group * BLOCK_BYTES, groups * blocks, piece, workspace);
}

/// [`into_blocks`] of a few rows, by way of a copy.
fn cut_group(
    matrix: &mut [u8],
    rows: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    workspace.clear();
    workspace.reserve_exact(matrix.len());
    workspace.extend_from_slice(matrix);
    let (source, _) = workspace.as_chunks::<BLOCK_BYTES>();
    let (target, _) = matrix.as_chunks_mut::<BLOCK_BYTES>();
    let blocks = source.len() / rows;
    for (block, pieces) in target.chunks_exact_mut(rows).enumerate() {
        for (i, piece) in pieces.iter_mut().enumerate() {
            *piece = source[order(i) * blocks + block];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::permute::{gated_shuffled32, shuffled32};

    #[test]
    fn blocks_are_columns_of_permuted_rows() {
        let (rows, row_bytes) = (4, 256);
        let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i / BLOCK_BYTES) as u8).collect();
        let mut matrix = source.clone();
        into_blocks(&mut matrix, rows, row_bytes, |i| 3 - i, &mut Vec::new());
        let got: Vec<u8> = matrix.chunks(BLOCK_BYTES).map(|c| c[0]).collect();
        // block 0 of rows 3 2 1 0, then block 1 of the same
        assert_eq!(got, [6, 4, 2, 0, 7, 5, 3, 1]);
    }

    /// Groups of 32 rows, of fewer, and of one; orders that leave them and one that does not.
    #[test]
    fn any_number_of_rows_equals_the_definition() {
        let shapes = [(64, 384), (96, 128), (12, 640), (7, 256), (0, 128), (4, 0)];
        let cases = shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]);
        for ((rows, row_bytes), shuffled) in cases {
            let shuffled = shuffled && rows % 32 == 0;
            let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 7 % 251) as u8).collect();
            let order = |i| if shuffled { shuffled32(i) } else { (i + 3) % rows };
            let mut matrix = source.clone();
            into_blocks(&mut matrix, rows, row_bytes, order, &mut Vec::new());
            for (at, byte) in matrix.iter().enumerate() {
                let (block, i, k) = (at / (rows * 128), at / 128 % rows, at % 128);
                let from = order(i) * row_bytes + block * 128 + k;
                assert_eq!(*byte, source[from], "{rows}×{row_bytes}: block {block}, ({i}, {k})");
            }
        }
    }

    /// As BF16 experts have it, with fewer columns.
    #[test]
    fn workspace_is_32_rows() {
        let (rows, row_bytes, mut workspace) = (256, 1024, Vec::new());
        let order = |i| gated_shuffled32(i, rows);
        into_blocks(&mut vec![0; rows * row_bytes], rows, row_bytes, order, &mut workspace);
        assert!(workspace.capacity() <= 32 * row_bytes, "{}", workspace.capacity());
    }
}
