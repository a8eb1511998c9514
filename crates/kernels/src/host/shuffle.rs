//! AITER's shuffles: E8M0 scales and 16×16 weight tiles, in place. Source: reference §4e.
//!
//! Both reorder a band of rows within itself, so the workspace is one band. Padding is the caller's to refuse: a shape that
//! would need any never gets here (contract §4 "aiter").

use std::array;

use crate::host::words::{transposed, woven};

/// Rows that one band of the scale shuffle covers.
const SCALE_BAND: usize = 32;
/// Rows that one band of the weight shuffle covers.
const WEIGHT_BAND: usize = 16;

/// Shuffles E8M0 scales `[rows, cols]`: element `(m, n)` goes to
/// `((m/32)·(cols/8) + n/8)·256 + (n%4)·64 + (m%16)·4 + ((n%8)/4)·2 + (m%32)/16`.
///
/// In place, one byte per scale; `workspace` grows to 32 rows. The matrix may be that of several experts.
///
/// # Panics
/// When `rows` is no multiple of 32, `cols` none of 8, or `matrix` does not have their size.
pub fn shuffle_scales(matrix: &mut [u8], rows: usize, cols: usize, workspace: &mut Vec<u8>) {
    assert!(rows % SCALE_BAND == 0 && cols % 8 == 0, "{rows}×{cols} is not whole 32×8 tiles");
    assert_eq!(matrix.len(), rows * cols, "matrix size");
    for band in matrix.chunks_exact_mut((SCALE_BAND * cols).max(1)) {
        let rows = copied(band, cols, workspace);
        for (tile_number, tile) in band.as_chunks_mut::<256>().0.iter_mut().enumerate() {
            let piece = |m: usize| rows(m).as_chunks::<8>().0[tile_number];
            let (words, _) = tile.as_chunks_mut::<16>();
            for m in (0..16).step_by(4) {
                let four = array::from_fn(|i| woven(piece(m + i), piece(m + i + 16)));
                for (n, word) in transposed(four).into_iter().enumerate() {
                    words[4 * n + m / 4] = word;
                }
            }
        }
    }
}

/// Shuffles packed weights `[rows, row_bytes]`: byte `(n, k)` goes to
/// `(n/16)·16·row_bytes + (k/32)·512 + ((k%32)/16)·256 + (n%16)·16 + k%16`.
///
/// In place; `workspace` grows to 16 rows. The matrix may be that of several experts, whose rows are multiples of 16.
///
/// # Panics
/// When `rows` is no multiple of 16, `row_bytes` none of 32, or `matrix` does not have their size.
pub fn shuffle_weights(matrix: &mut [u8], rows: usize, row_bytes: usize, workspace: &mut Vec<u8>) {
    assert!(
        rows % WEIGHT_BAND == 0 && row_bytes % 32 == 0,
        "{rows}×{row_bytes} is not whole 16×32 tiles"
    );
    assert_eq!(matrix.len(), rows * row_bytes, "matrix size");
    for band in matrix.chunks_exact_mut((WEIGHT_BAND * row_bytes).max(1)) {
        let rows = copied(band, row_bytes, workspace);
        let rows: [&[[u8; 16]]; WEIGHT_BAND] = array::from_fn(|n| rows(n).as_chunks().0);
        let (tiles, _) = band.as_chunks_mut::<16>().0.as_chunks_mut::<WEIGHT_BAND>();
        for (panel, tiles) in tiles.chunks_mut(4).enumerate() {
            for (n, row) in rows.iter().enumerate() {
                for (tile, piece) in tiles.iter_mut().zip(&row[4 * panel..]) {
                    tile[n] = *piece;
                }
            }
        }
    }
}

/// Copies `band` to `workspace` and gives access to its rows.
fn copied<'w>(
    band: &[u8],
    row_bytes: usize,
    workspace: &'w mut Vec<u8>,
) -> impl Fn(usize) -> &'w [u8] + use<'w> {
    workspace.clear();
    workspace.reserve_exact(band.len());
    workspace.extend_from_slice(band);
    let copy: &'w [u8] = workspace;
    move |row| &copy[row * row_bytes..][..row_bytes]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 256) as u8).collect()
    }

    #[test]
    fn scales_go_where_the_formula_says() {
        for (rows, cols) in [(0, 8), (32, 0), (32, 8), (256, 16), (64, 40)] {
            let source = bytes(rows * cols);
            let (mut got, mut workspace) = (source.clone(), Vec::new());
            shuffle_scales(&mut got, rows, cols, &mut workspace);
            assert!(workspace.capacity() <= 32 * cols, "{rows}×{cols} workspace");
            for m in 0..rows {
                for n in 0..cols {
                    let at = ((m / 32) * (cols / 8) + n / 8) * 256
                        + (n % 4) * 64
                        + (m % 16) * 4
                        + ((n % 8) / 4) * 2
                        + (m % 32) / 16;
                    assert_eq!(got[at], source[m * cols + n], "{rows}×{cols}: ({m}, {n})");
                }
            }
        }
    }

    #[test]
    fn weights_go_where_the_formula_says() {
        for (rows, row_bytes) in [(0, 32), (16, 0), (16, 32), (64, 96), (32, 320)] {
            let source = bytes(rows * row_bytes);
            let (mut got, mut workspace) = (source.clone(), Vec::new());
            shuffle_weights(&mut got, rows, row_bytes, &mut workspace);
            assert!(workspace.capacity() <= 16 * row_bytes, "{rows}×{row_bytes} workspace");
            for n in 0..rows {
                for k in 0..row_bytes {
                    let at = (n / 16) * 16 * row_bytes
                        + (k / 32) * 512
                        + ((k % 32) / 16) * 256
                        + (n % 16) * 16
                        + k % 16;
                    assert_eq!(got[at], source[n * row_bytes + k], "({n}, {k})");
                }
            }
        }
    }

    proptest! {
        /// Nothing is lost and nothing is doubled: sorted, the bytes are the same.
        #[test]
        fn shuffles_permute(bands in 1usize..4, tiles in 1usize..12, seed: u8) {
            let (rows, cols) = (32 * bands, 32 * tiles);
            let mut source = bytes(rows * cols);
            source.iter_mut().for_each(|b| *b = b.wrapping_mul(seed | 1));
            let (mut scales, mut weights) = (source.clone(), source.clone());
            shuffle_scales(&mut scales, rows, cols, &mut Vec::new());
            shuffle_weights(&mut weights, rows, cols, &mut Vec::new());
            for matrix in [&mut source, &mut scales, &mut weights] {
                matrix.sort_unstable();
            }
            prop_assert!(scales == source && weights == source);
        }
    }
}
