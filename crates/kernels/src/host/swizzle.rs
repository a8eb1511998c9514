//! SWZ: the 128×4 layout that tensor cores read block scales in. Source: reference §4.0.
//!
//! Of a matrix of one-byte scales `[rows, cols]`, element `(m, k)` goes to
//! `(m/128)·(Kp/4)·512 + (k/4)·512 + (m%32)·16 + ((m%128)/32)·4 + k%4`, where `Kp` is `cols` rounded up to 4:
//! each 128 rows are a block of their own, within which 4-byte words are transposed.
//!
//! ```text
//! 128 rows ┌ word 0 │ word 1 │ …        block  ┌ tile 0: 512 bytes                    │ tile 1 │ …
//!        r │  a_r   │        │          ────►  │ a0 a32 a64 a96 │ a1 a33 a65 a97 │ …
//!          └        │        │                 └ 16 bytes for each r of 32
//! ```

use std::array;

use crate::host::{rows::permute_rows, words::transposed};

/// Rows of a block.
pub const BLOCK_ROWS: usize = 128;
/// Columns of a word.
const WORD: usize = 4;
/// Rows of a block whose words stand side by side: r, r+32, r+64 and r+96 for each r of 32.
const TILE_ROWS: usize = 32;
/// Tiles that are filled together: of each row, the 64 bytes of a cache line.
const PANEL_TILES: usize = 16;
/// Columns of a panel.
const PANEL: usize = PANEL_TILES * WORD;

/// One word of all rows of a block: 16 bytes for each of 32 rows.
type Tile = [[u8; 4 * WORD]; TILE_ROWS];

/// Shape of the swizzled matrix: rows rounded up to 128, columns to 4.
pub fn padded(rows: usize, cols: usize) -> (usize, usize) {
    (rows.next_multiple_of(BLOCK_ROWS), cols.next_multiple_of(WORD))
}

/// Swizzles `source` into `target`. Row `m` of the padded matrix is row `order(m)` of the source, and zero where
/// `order(m) >= rows`; padding comes before the order.
///
/// **Shapes**: `source` `[rows, cols]`, `target` [`padded`]`(rows, cols)`, one byte per element; `order` is asked once
/// for each padded row. All of `target` is written.
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
    for (number, block) in target.chunks_exact_mut(block_bytes(padded_cols)).enumerate() {
        let row = |m| {
            let from = order(number * BLOCK_ROWS + m);
            if from < rows { &source[from * cols..][..cols] } else { &[] }
        };
        swizzle_block(array::from_fn(row), block, cols);
    }
}

/// Swizzles `matrix` in place: row `m` of what is swizzled is row `order(m)` of the matrix.
///
/// **Shapes**: `matrix` `[rows, cols]`, one byte per element. Rows move only within bands of `band` rows, a multiple of
/// 128: 128 for the identity and SHUF32, all rows for W31PERM and IL64. `workspace` grows to 128 rows (or, for narrow
/// matrices, a row and a bit per row): no more than a band.
///
/// # Panics
/// When the shape would need padding, `rows` is no multiple of `band` or `band` none of 128, `matrix` does not have its
/// size, or `order` leaves a band.
pub fn swizzle_in_place(
    matrix: &mut [u8],
    rows: usize,
    cols: usize,
    order: impl Fn(usize) -> usize,
    band: usize,
    workspace: &mut Vec<u8>,
) {
    assert_eq!(padded(rows, cols), (rows, cols), "in place there is no room for padding");
    assert_eq!(matrix.len(), rows * cols, "matrix size");
    if matrix.is_empty() {
        return;
    }
    assert!(band != 0 && band % BLOCK_ROWS == 0 && rows % band == 0, "bands of {band} of {rows}");
    for (number, rows) in matrix.chunks_exact_mut(band * cols).enumerate() {
        let order = |m| order(number * band + m).wrapping_sub(number * band);
        if band == BLOCK_ROWS {
            swizzle_block_in_place(rows, cols, order, workspace);
            continue;
        }
        permute_rows(rows, cols, band, order, workspace);
        for block in rows.chunks_exact_mut(BLOCK_ROWS * cols) {
            swizzle_block_in_place(block, cols, |m| m, workspace);
        }
    }
}

/// Swizzles 128 rows, by way of a copy that stays in the second-level cache.
fn swizzle_block_in_place(
    block: &mut [u8],
    cols: usize,
    order: impl Fn(usize) -> usize,
    workspace: &mut Vec<u8>,
) {
    workspace.clear();
    workspace.reserve_exact(block.len());
    workspace.extend_from_slice(block);
    swizzle_block(array::from_fn(|m| &workspace[order(m) * cols..][..cols]), block, cols);
}

/// Bytes of a block; not zero, so that an empty matrix has no blocks rather than none of a size.
fn block_bytes(padded_cols: usize) -> usize {
    (BLOCK_ROWS * padded_cols).max(1)
}

/// Fills one block from its rows, `cols` bytes each or empty for zeros. Panel by panel, so that of source and target
/// alike a cache line is used up while it is near.
fn swizzle_block(rows: [&[u8]; BLOCK_ROWS], block: &mut [u8], cols: usize) {
    let (tiles, _) = block.as_chunks_mut::<16>().0.as_chunks_mut::<TILE_ROWS>();
    let complete = rows.iter().all(|row| row.len() == cols);
    let whole_panels = if complete { cols / PANEL } else { 0 };
    let (whole, rest) = tiles.split_at_mut(whole_panels * PANEL_TILES);
    for (panel, tiles) in whole.as_chunks_mut::<PANEL_TILES>().0.iter_mut().enumerate() {
        for r in 0..TILE_ROWS {
            let piece = |q: usize| &rows[q * TILE_ROWS + r].as_chunks::<PANEL>().0[panel];
            interleave(array::from_fn(piece), tiles, r);
        }
    }
    for (panel, tiles) in (whole_panels..).zip(rest.chunks_mut(PANEL_TILES)) {
        let columns = panel * PANEL..cols.min((panel + 1) * PANEL);
        for r in 0..TILE_ROWS {
            let mut pieces = [[0; PANEL]; 4];
            for (q, piece) in pieces.iter_mut().enumerate() {
                let row = rows[q * TILE_ROWS + r].get(columns.clone()).unwrap_or_default();
                piece[..row.len()].copy_from_slice(row);
            }
            interleave(pieces.each_ref(), tiles, r);
        }
    }
}

/// Words of four rows into row `r` of the tiles of a panel.
#[inline]
fn interleave(rows: [&[u8; PANEL]; 4], tiles: &mut [Tile], r: usize) {
    let rows = rows.map(|row| row.as_chunks::<16>().0);
    for (j, tiles) in tiles.chunks_mut(4).enumerate() {
        let words = transposed(rows.map(|row| row[j]));
        for (tile, word) in tiles.iter_mut().zip(words) {
            tile[r] = word;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::permute::{gated_shuffled32, interleaved64, shuffled32};

    /// The formula of §4.0, element by element, of the padded matrix in the given order.
    fn naive(source: &[u8], rows: usize, cols: usize, order: impl Fn(usize) -> usize) -> Vec<u8> {
        let (padded_rows, padded_cols) = padded(rows, cols);
        let mut out = vec![0; padded_rows * padded_cols];
        for m in 0..padded_rows {
            for k in 0..cols {
                let at = (m / 128) * (padded_cols / 4) * 512
                    + (k / 4) * 512
                    + (m % 32) * 16
                    + ((m % 128) / 32) * 4
                    + k % 4;
                out[at] = if order(m) < rows { source[order(m) * cols + k] } else { 0 };
            }
        }
        out
    }

    fn swizzled(
        source: &[u8],
        rows: usize,
        cols: usize,
        order: impl Fn(usize) -> usize,
    ) -> Vec<u8> {
        let (padded_rows, padded_cols) = padded(rows, cols);
        let mut target = vec![7; padded_rows * padded_cols];
        swizzle(source, &mut target, rows, cols, order);
        target
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 255 + 1) as u8).collect()
    }

    #[test]
    fn golden_vectors_of_the_reference() {
        let source: Vec<u8> = (1..=15).collect();
        let target = swizzled(&source, 3, 5, |m| m);
        let found: Vec<(usize, u8)> =
            target.iter().copied().enumerate().filter(|(_, v)| *v != 0).collect();
        let places = [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 512, 528, 544];
        let values = [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 5, 10, 15];
        let want: Vec<(usize, u8)> = places.into_iter().zip(values).collect();
        assert_eq!((found, target.len()), (want, 128 * 8));

        let source: Vec<u8> = (0..512).map(|i| (i % 256) as u8).collect();
        let target = swizzled(&source, 128, 4, |m| m);
        let want: Vec<u8> = [0u16, 128, 256, 384, 4, 132]
            .iter()
            .flat_map(|start| (*start..start + 4).map(|v| (v % 256) as u8))
            .collect();
        assert_eq!(target[..24], want);
    }

    #[test]
    fn any_shape_equals_the_formula() {
        for rows in [0, 1, 3, 127, 128, 130, 384] {
            for cols in [0, 1, 4, 5, 13, 63, 64, 65, 128, 140] {
                let source = bytes(rows * cols);
                let target = swizzled(&source, rows, cols, |m| m);
                assert_eq!(target, naive(&source, rows, cols, |m| m), "{rows}×{cols}");
            }
        }
    }

    /// SHUFSF and its gated kin: rows in another order first, then swizzled; in place the same.
    #[test]
    fn an_order_of_rows_comes_first() {
        type Order = fn(usize) -> usize;
        let orders: [(&str, usize, Order); 4] = [
            ("identity", 128, |m| m),
            ("SHUF32", 128, shuffled32),
            ("W31PERM", 256, |m| m / 256 * 256 + gated_shuffled32(m % 256, 256)),
            ("IL64", 256, |m| m / 256 * 256 + interleaved64(m % 256, 256)),
        ];
        for (name, band, order) in orders {
            for (rows, cols) in [(256, 12), (512, 128), (256, 196)] {
                let source = bytes(rows * cols);
                let want = naive(&source, rows, cols, order);
                assert!(swizzled(&source, rows, cols, order) == want, "{name} {rows}×{cols}");
                let (mut matrix, mut workspace) = (source, Vec::new());
                swizzle_in_place(&mut matrix, rows, cols, order, band, &mut workspace);
                assert!(matrix == want, "{name} {rows}×{cols} in place");
                assert!(workspace.capacity() <= band * cols, "{name} {rows}×{cols} workspace");
            }
        }
    }

    /// A scale whose rows are no multiple of 128 is padded first, then shuffled: zero rows move too.
    #[test]
    fn padding_comes_before_the_order() {
        for (rows, cols) in [(40, 5), (100, 64), (144, 70), (1, 4)] {
            let source = bytes(rows * cols);
            let want = naive(&source, rows, cols, shuffled32);
            assert_eq!(swizzled(&source, rows, cols, shuffled32), want, "{rows}×{cols}");
        }
        // SHUF32 brings row 40, which 40 rows do not have, to row 34, and row 33 to row 40
        let target = swizzled(&[9; 40 * 4], 40, 4, shuffled32);
        assert_eq!((target[2 * 16 + 4], target[8 * 16 + 4]), (0, 9));
    }

    #[test]
    #[should_panic(expected = "bands of 192 of 384")]
    fn a_band_is_whole_blocks() {
        swizzle_in_place(&mut [0; 384 * 4], 384, 4, |m| m, 192, &mut Vec::new());
    }

    #[test]
    #[should_panic(expected = "no room for padding")]
    fn a_padded_shape_does_not_fit_in_place() {
        swizzle_in_place(&mut [0; 128 * 5], 128, 5, |m| m, 128, &mut Vec::new());
    }

    proptest! {
        #[test]
        fn random_shapes_and_orders_equal_the_formula(
            rows in 1usize..300,
            cols in 1usize..150,
            offset in 0usize..300,
        ) {
            let source = bytes(rows * cols);
            let (padded_rows, _) = padded(rows, cols);
            let order = |m: usize| (m + offset) % padded_rows;
            prop_assert!(swizzled(&source, rows, cols, order) == naive(&source, rows, cols, order));
        }
    }
}
