//! AITER's shuffles: E8M0 scales and 16×16 weight tiles, in place. Source: reference §4e.
//!
//! Both reorder a band of rows within itself, so the workspace is one band.

/// Rows that one band of the scale shuffle covers.
const SCALE_BAND: usize = 32;
/// Rows that one band of the weight shuffle covers.
const WEIGHT_BAND: usize = 16;

/// Shuffles E8M0 scales `[rows, cols]`: element `(m, n)` goes to
/// `((m/32)·(cols/8) + n/8)·256 + (n%4)·64 + (m%16)·4 + ((n%8)/4)·2 + (m%32)/16`.
///
/// # Panics
/// When `rows` is no multiple of 32, `cols` none of 8, or `matrix` does not have their size.
pub fn shuffle_scales(matrix: &mut [u8], rows: usize, cols: usize, workspace: &mut Vec<u8>) {
    assert!(rows % SCALE_BAND == 0 && cols % 8 == 0, "{rows}×{cols} is not whole 32×8 tiles");
    assert_eq!(matrix.len(), rows * cols, "matrix size");
    for band in matrix.chunks_exact_mut((SCALE_BAND * cols).max(1)) {
        workspace.clear();
        workspace.extend_from_slice(band);
        for (tile_number, tile) in band.as_chunks_mut::<256>().0.iter_mut().enumerate() {
            for n in 0..8 {
                for m in 0..SCALE_BAND {
                    tile[n % 4 * 64 + m % 16 * 4 + n / 4 * 2 + m / 16] =
                        workspace[m * cols + tile_number * 8 + n];
                }
            }
        }
    }
}

/// Shuffles packed weights `[rows, row_bytes]`: byte `(n, k)` goes to
/// `(n/16)·16·row_bytes + (k/32)·512 + ((k%32)/16)·256 + (n%16)·16 + k%16`.
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
        workspace.clear();
        workspace.extend_from_slice(band);
        for n in 0..WEIGHT_BAND {
            let (pieces, _) = workspace[n * row_bytes..][..row_bytes].as_chunks::<16>();
            for (piece, bytes) in pieces.iter().enumerate() {
                band[piece * 256 + n * 16..][..16].copy_from_slice(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 256) as u8).collect()
    }

    #[test]
    fn scales_go_where_the_formula_says() {
        for (rows, cols) in [(32, 8), (256, 16), (64, 40)] {
            let source = bytes(rows * cols);
            let mut got = source.clone();
            shuffle_scales(&mut got, rows, cols, &mut Vec::new());
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
        for (rows, row_bytes) in [(16, 32), (64, 96)] {
            let source = bytes(rows * row_bytes);
            let mut got = source.clone();
            shuffle_weights(&mut got, rows, row_bytes, &mut Vec::new());
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
}
