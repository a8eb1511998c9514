//! Rows in another order, in place.

/// Row `i` of the result is row `order(i)` of `matrix` `[rows, row_bytes]`; rows move only within bands of `band` rows,
/// so `workspace` grows to one band.
///
/// # Panics
/// When `rows` is no multiple of `band`, the matrix does not have its size, or `order` leaves a band.
pub fn permute_rows(
    matrix: &mut [u8],
    row_bytes: usize,
    band: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    assert_eq!(matrix.len() % (band * row_bytes).max(1), 0, "whole bands");
    for (number, rows) in matrix.chunks_exact_mut((band * row_bytes).max(1)).enumerate() {
        workspace.clear();
        workspace.extend_from_slice(rows);
        for (i, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
            let from = order(number * band + i) - number * band;
            row.copy_from_slice(&workspace[from * row_bytes..][..row_bytes]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::permute::{gated_shuffled32, interleaved64, shuffled32};

    #[test]
    fn rows_move_as_ordered() {
        let (rows, row_bytes) = (128, 3);
        let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i / row_bytes) as u8).collect();
        type Order = fn(usize) -> usize;
        let orders: [(usize, Order); 3] = [
            (32, shuffled32),
            (rows, |i| gated_shuffled32(i, 128)),
            (rows, |i| interleaved64(i, 128)),
        ];
        for (band, order) in orders {
            let mut matrix = source.clone();
            permute_rows(&mut matrix, row_bytes, band, order, &mut Vec::new());
            for i in 0..rows {
                assert_eq!(usize::from(matrix[i * row_bytes + 2]), order(i), "row {i}");
            }
        }
    }
}
