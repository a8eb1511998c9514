//! Rows in another order, in place. The orders: [`super::permute`], reference §4.0.
//!
//! Rows follow the cycles of the order, so that each is read once and written once:
//!
//! ```text
//! SHUF32   row 1 ← row 4 ← row 16 ← row 2 ← row 8 ← row 1
//!          workspace ← row 1, 1 ← row 4, 4 ← row 16, 16 ← row 2, 2 ← row 8, 8 ← workspace
//! ```
//!
//! A row is overwritten right after it has been read, while it is in the first-level cache: however large the band, the
//! matrix is read and written once, and the workspace is a row. W31PERM of a `[4096, 3584]` matrix runs at 27 GB/s, by way
//! of a copy of the band at 7.5 (one thread; a plain copy: 15).

/// Bands of up to this size, short rows in other words, are copied whole: that reads them in order, which memory likes
/// better than jumps of 128 bytes (SHUF32 of 128-byte rows beyond all caches: 9 GB/s against 6).
const COPIED_BAND_BYTES_MAX: usize = 8 << 10;

/// Permutes the rows of `matrix` in place: row `i` of the result is row `order(i)` of the source.
///
/// **Shapes**: `matrix` `[rows, row_bytes]`, whatever its elements are. Rows move only within bands of `band` rows: 32 for SHUF32, all rows for W31PERM and IL64. `workspace` grows to a row
/// and a bit per row of a band, or to a band of 8 KiB: in any case no more than one band.
///
/// # Panics
/// When `rows` is no multiple of `band`, or `order` leaves a band. An order that is no permutation panics, or gives some
/// rows twice.
pub fn permute_rows(
    matrix: &mut [u8],
    row_bytes: usize,
    band: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    let band_bytes = (band * row_bytes).max(1);
    assert_eq!(matrix.len() % band_bytes, 0, "whole bands");
    workspace.clear();
    for (number, rows) in matrix.chunks_exact_mut(band_bytes).enumerate() {
        let order = |i: usize| order(number * band + i).wrapping_sub(number * band);
        if band_bytes <= COPIED_BAND_BYTES_MAX {
            gather(rows, row_bytes, order, workspace);
        } else {
            follow_cycles(rows, row_bytes, order, workspace);
        }
    }
}

/// Permutes one band by way of a copy.
fn gather(
    rows: &mut [u8],
    row_bytes: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    workspace.clear();
    workspace.reserve_exact(rows.len());
    workspace.extend_from_slice(rows);
    for (to, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
        row.copy_from_slice(&workspace[order(to) * row_bytes..][..row_bytes]);
    }
}

/// Permutes one band cycle by cycle; of each, the first row waits in the workspace until its place is free.
fn follow_cycles(
    rows: &mut [u8],
    row_bytes: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    let count = rows.len() / row_bytes;
    workspace.clear();
    workspace.reserve_exact(row_bytes + count.div_ceil(8));
    workspace.resize(row_bytes + count.div_ceil(8), 0);
    let (spare, placed) = workspace.split_at_mut(row_bytes);
    let range = |row: usize| row * row_bytes..(row + 1) * row_bytes;
    for start in 0..count {
        if is_set(placed, start) || order(start) == start {
            continue;
        }
        spare.copy_from_slice(&rows[range(start)]);
        let mut to = start;
        loop {
            placed[to / 8] |= 1 << (to % 8);
            let from = order(to);
            if from == start {
                break;
            }
            assert!(from < count && !is_set(placed, from), "row {from} of {count}: no permutation");
            rows.copy_within(range(from), to * row_bytes);
            to = from;
        }
        rows[range(to)].copy_from_slice(spare);
    }
}

fn is_set(bits: &[u8], i: usize) -> bool {
    bits[i / 8] >> (i % 8) & 1 == 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::permute::{gated_shuffled32, interleaved64, shuffled32};

    fn naive(matrix: &[u8], row_bytes: usize, order: impl Fn(usize) -> usize) -> Vec<u8> {
        let rows = matrix.len() / row_bytes;
        (0..rows).flat_map(|i| matrix[order(i) * row_bytes..][..row_bytes].to_vec()).collect()
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 251) as u8).collect()
    }

    /// Short rows and long ones take different ways to the same result, within one band of workspace.
    #[test]
    fn rows_move_as_ordered() {
        type Order = fn(usize) -> usize;
        let orders: [(&str, usize, Order); 4] = [
            ("identity", 1, |i| i),
            ("SHUF32", 32, shuffled32),
            ("W31PERM", 384, |i| i / 384 * 384 + gated_shuffled32(i % 384, 384)),
            ("IL64", 384, |i| i / 384 * 384 + interleaved64(i % 384, 384)),
        ];
        for (name, band, order) in orders {
            for row_bytes in [1, 3, 64, 257, 1000] {
                let source = bytes(768 * row_bytes);
                let (mut matrix, mut workspace) = (source.clone(), Vec::new());
                permute_rows(&mut matrix, row_bytes, band, order, &mut workspace);
                assert!(matrix == naive(&source, row_bytes, order), "{name}, {row_bytes}");
                assert!(workspace.capacity() <= band * row_bytes, "{name}, {row_bytes}: workspace");
            }
        }
    }

    /// A large band needs a row and a bit per row, not a copy.
    #[test]
    fn workspace_does_not_grow_with_the_rows() {
        let (rows, row_bytes) = (4096, 448);
        let mut workspace = Vec::new();
        let order = |i| gated_shuffled32(i, rows);
        permute_rows(&mut bytes(rows * row_bytes), row_bytes, rows, order, &mut workspace);
        assert!(workspace.capacity() <= row_bytes + rows / 8);
    }

    #[test]
    fn an_empty_matrix_stays_empty() {
        permute_rows(&mut [], 0, 32, |i| i, &mut Vec::new());
        permute_rows(&mut [], 16, 0, |i| i, &mut Vec::new());
    }

    #[test]
    #[should_panic(expected = "no permutation")]
    fn an_order_that_repeats_a_row_is_refused() {
        permute_rows(&mut [0; 64 * 256], 256, 64, |i| i / 2, &mut Vec::new());
    }

    #[test]
    #[should_panic(expected = "no permutation")]
    fn an_order_that_leaves_its_band_is_refused() {
        permute_rows(&mut [0; 128 * 256], 256, 64, |i| 127 - i, &mut Vec::new());
    }

    proptest! {
        #[test]
        fn any_permutation_is_carried_out(
            order in Just((0..97).collect::<Vec<usize>>()).prop_shuffle(),
            row_bytes in prop::sample::select(vec![5usize, 100]),
        ) {
            let source = bytes(97 * row_bytes);
            let mut matrix = source.clone();
            permute_rows(&mut matrix, row_bytes, 97, |i| order[i], &mut Vec::new());
            prop_assert!(matrix == naive(&source, row_bytes, |i| order[i]));
        }
    }
}
