//! SWZ: the 128×4 layout that tensor cores read block scales in. Source: reference §4.0.
//!
//! Of a matrix of one-byte scales `[rows, cols]`, element `(m, k)` goes to
//! `(m/128)·(Kp/4)·512 + (k/4)·512 + (m%32)·16 + ((m%128)/32)·4 + k%4`, where `Kp` is `cols` rounded up to 4:
//! each 128 rows are a block of their own, within which 4-byte words are transposed.

use std::ops::Range;

/// Rows of a block.
pub const BLOCK_ROWS: usize = 128;
/// Columns of a word.
const WORD: usize = 4;

/// Shape of the swizzled matrix: rows rounded up to 128, columns to 4.
pub fn padded(rows: usize, cols: usize) -> (usize, usize) {
    (rows.next_multiple_of(BLOCK_ROWS), cols.next_multiple_of(WORD))
}

/// Swizzles `source` `[rows, cols]` into `target` ([`padded`] shape); padding becomes zero. Row `m` of the swizzled
/// matrix is row `order(m)` of the source.
///
/// # Panics
/// When a slice does not have the size of its shape.
pub fn swizzle(
    source: &[u8],
    target: &mut [u8],
    rows: usize,
    cols: usize,
    order: impl Fn(usize) -> usize,
) {
    let (padded_rows, padded_cols) = padded(rows, cols);
    assert_eq!(source.len(), rows * cols, "source size");
    assert_eq!(target.len(), padded_rows * padded_cols, "target size");
    if (rows, cols) != (padded_rows, padded_cols) {
        target.fill(0);
    }
    let blocks = target.chunks_exact_mut((BLOCK_ROWS * padded_cols).max(1));
    for (number, block) in blocks.enumerate() {
        let first = number * BLOCK_ROWS;
        swizzle_block(source, block, first..rows.min(first + BLOCK_ROWS), cols, &order);
    }
}

/// Swizzles `matrix` `[rows, cols]` in place, 128 rows at a time; `workspace` grows to one block.
///
/// # Panics
/// When the shape would need padding, or `matrix` does not have its size.
pub fn swizzle_in_place(matrix: &mut [u8], rows: usize, cols: usize, workspace: &mut Vec<u8>) {
    assert_eq!(padded(rows, cols), (rows, cols), "in place there is no room for padding");
    assert_eq!(matrix.len(), rows * cols, "matrix size");
    for block in matrix.chunks_exact_mut((BLOCK_ROWS * cols).max(1)) {
        workspace.clear();
        workspace.extend_from_slice(block);
        swizzle_block(workspace, block, 0..BLOCK_ROWS, cols, &|m| m);
    }
}

/// Fills one block with up to 128 rows.
fn swizzle_block(
    source: &[u8],
    block: &mut [u8],
    rows: Range<usize>,
    cols: usize,
    order: &impl Fn(usize) -> usize,
) {
    let row = |m: usize| &source[order(m) * cols..][..cols];
    let whole = cols / WORD;
    if rows.len() == BLOCK_ROWS {
        // four rows, 32 apart, give 16 neighbouring bytes of the result
        for r in 0..32 {
            let four = [0, 32, 64, 96].map(|q| row(rows.start + q + r).as_chunks::<WORD>().0);
            let [a, b, c, d] = four.map(|words| &words[..whole]);
            let (tiles, _) = block.as_chunks_mut::<512>();
            for (k, tile) in tiles[..whole].iter_mut().enumerate() {
                let out = &mut tile[r * 16..][..16];
                out[..4].copy_from_slice(&a[k]);
                out[4..8].copy_from_slice(&b[k]);
                out[8..12].copy_from_slice(&c[k]);
                out[12..].copy_from_slice(&d[k]);
            }
        }
    } else {
        for m in 0..rows.len() {
            let (words, _) = row(rows.start + m).as_chunks::<WORD>();
            for (k, word) in words.iter().enumerate() {
                block[k * 512 + m % 32 * 16 + m / 32 * 4..][..4].copy_from_slice(word);
            }
        }
    }
    if cols % WORD != 0 {
        for m in 0..rows.len() {
            let rest = &row(rows.start + m)[whole * WORD..];
            block[whole * 512 + m % 32 * 16 + m / 32 * 4..][..rest.len()].copy_from_slice(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::permute::shuffled32;

    /// The formula of §4.0, element by element.
    fn naive(source: &[u8], rows: usize, cols: usize) -> Vec<u8> {
        let (padded_rows, padded_cols) = padded(rows, cols);
        let mut out = vec![0; padded_rows * padded_cols];
        for m in 0..rows {
            for k in 0..cols {
                let at = (m / 128) * (padded_cols / 4) * 512
                    + (k / 4) * 512
                    + (m % 32) * 16
                    + ((m % 128) / 32) * 4
                    + k % 4;
                out[at] = source[m * cols + k];
            }
        }
        out
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 255 + 1) as u8).collect()
    }

    #[test]
    fn golden_vectors_of_the_reference() {
        let source: Vec<u8> = (1..=15).collect();
        let mut target = vec![9; 128 * 8];
        swizzle(&source, &mut target, 3, 5, |m| m);
        let found: Vec<(usize, u8)> =
            target.iter().copied().enumerate().filter(|(_, v)| *v != 0).collect();
        let places = [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 512, 528, 544];
        let values = [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 5, 10, 15];
        let want: Vec<(usize, u8)> = places.into_iter().zip(values).collect();
        assert_eq!(found, want);

        let source: Vec<u8> = (0..512).map(|i| (i % 256) as u8).collect();
        let mut target = vec![0; 512];
        swizzle(&source, &mut target, 128, 4, |m| m);
        let want: Vec<u8> = [0u16, 128, 256, 384, 4, 132]
            .iter()
            .flat_map(|start| (*start..start + 4).map(|v| (v % 256) as u8))
            .collect();
        assert_eq!(target[..24], want);
    }

    #[test]
    fn any_shape_equals_the_formula() {
        for (rows, cols) in [(1, 1), (3, 5), (128, 4), (127, 8), (130, 6), (256, 64), (384, 13)] {
            let source = bytes(rows * cols);
            let (padded_rows, padded_cols) = padded(rows, cols);
            let mut target = vec![7; padded_rows * padded_cols];
            swizzle(&source, &mut target, rows, cols, |m| m);
            assert_eq!(target, naive(&source, rows, cols), "{rows}×{cols}");
            if (rows, cols) == (padded_rows, padded_cols) {
                let mut matrix = source.clone();
                swizzle_in_place(&mut matrix, rows, cols, &mut Vec::new());
                assert_eq!(matrix, target, "{rows}×{cols} in place");
            }
        }
    }

    /// SHUFSF: rows shuffled first, then swizzled.
    #[test]
    fn an_order_of_rows_comes_first() {
        let (rows, cols) = (256, 12);
        let source = bytes(rows * cols);
        let shuffled: Vec<u8> =
            (0..rows).flat_map(|m| source[shuffled32(m) * cols..][..cols].to_vec()).collect();
        let mut target = vec![0; rows * cols];
        swizzle(&source, &mut target, rows, cols, shuffled32);
        assert_eq!(target, naive(&shuffled, rows, cols));
    }
}
