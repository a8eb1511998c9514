//! BLK: a matrix cut into blocks of columns. Source: reference §4.0, §4g.

/// Bytes of a row within a block.
pub const BLOCK_BYTES: usize = 128;

/// `[rows, row_bytes]` → `[row_bytes/128, rows, 128]`, in place; row `i` of the result is row `order(i)` of the source.
///
/// `workspace` grows to one matrix and can be reused.
///
/// # Panics
/// When `matrix` is not `rows · row_bytes` bytes or a row is no whole number of blocks.
pub fn into_blocks(
    matrix: &mut [u8],
    rows: usize,
    row_bytes: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    assert_eq!(matrix.len(), rows * row_bytes, "matrix size");
    assert_eq!(row_bytes % BLOCK_BYTES, 0, "rows must be whole blocks");
    workspace.clear();
    workspace.extend_from_slice(matrix);
    for (block, target) in matrix.chunks_exact_mut(rows * BLOCK_BYTES).enumerate() {
        for (i, to) in target.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let from = order(i) * row_bytes + block * BLOCK_BYTES;
            to.copy_from_slice(&workspace[from..from + BLOCK_BYTES]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
