//! The permutations that kernels want, each as the formula of its definition.
//!
//! | name here | name in the reference | what moves |
//! |---|---|---|
//! | [`swizzle_128x4`] | SWZ | block scales, padded to 128 × 4 |
//! | [`shuffle_rows_32`] | SHUF32 | rows within blocks of 32 |
//! | [`interleave_and_shuffle`] | W31PERM | rows of two halves, interleaved, then SHUF32 |
//! | [`column_blocks`] | BLK | `[M, K]` to `[K/b, M, b]` |
//! | [`shuffle_e8m0`] | E8M0 shuffle | MXFP4 scales of all experts |
//! | [`shuffle_16x16`] | (16,16) shuffle | bytes of MXFP4 weights |

use super::tensor::Tensor;

/// Scales of one byte, padded with zeros to whole tiles of 128 × 4.
pub(super) fn swizzle_128x4(scales: &Tensor) -> Tensor {
    let [rows, columns] = scales.matrix();
    let (tall, wide) = (rows.next_multiple_of(128), columns.next_multiple_of(4));
    assert_eq!(scales.element(), 1);
    let mut out = Tensor::zeros(&scales.dtype, &[tall, wide]);
    for m in 0..rows {
        for k in 0..columns {
            let tile = (m / 128) * (wide / 4) * 512 + (k / 4) * 512;
            let at = tile + (m % 32) * 16 + ((m % 128) / 32) * 4 + k % 4;
            out.bytes[at] = scales.bytes[m * columns + k];
        }
    }
    out
}

/// Out row 32t + 8a + b is in row 32t + 4b + a, for a in 0..4 and b in 0..8.
pub(super) fn shuffle_rows_32(weight: &Tensor) -> Tensor {
    gather_rows(weight, shuffled_32)
}

/// Interleaves the two halves of the rows, then shuffles them as [`shuffle_rows_32`] does.
pub(super) fn interleave_and_shuffle(weight: &Tensor) -> Tensor {
    let half = weight.shape[0] / 2;
    gather_rows(weight, |row| {
        let j = shuffled_32(row);
        if j % 2 == 0 { j / 2 } else { half + j / 2 }
    })
}

fn shuffled_32(row: usize) -> usize {
    let (t, q) = (row / 32, row % 32);
    let (a, b) = (q / 8, q % 8);
    32 * t + 4 * b + a
}

fn gather_rows(weight: &Tensor, source: impl Fn(usize) -> usize) -> Tensor {
    let rows = weight.shape[0];
    assert_eq!(rows % 32, 0, "{rows} rows are no whole blocks of 32");
    let parts: Vec<Tensor> = (0..rows).map(|row| weight.rows(source(row), 1)).collect();
    Tensor::stack(&parts)
}

/// `[M, K]` to `[K/block, M, block]`: the columns in blocks, one block after the other.
pub(super) fn column_blocks(weight: &Tensor, block: usize) -> Tensor {
    let [_, columns] = weight.matrix();
    assert_eq!(columns % block, 0, "{columns} columns are no whole blocks of {block}");
    let blocks = (0..columns / block).map(|i| weight.columns(i * block, block));
    Tensor::batch(&blocks.collect::<Vec<_>>())
}

/// E8M0 scales, all experts' rows below each other; rows are a multiple of 256, columns of 8.
pub(super) fn shuffle_e8m0(scales: &Tensor) -> Tensor {
    let [rows, columns] = scales.matrix();
    assert!(rows % 256 == 0 && columns % 8 == 0, "{rows} x {columns} scales");
    let mut out = scales.clone();
    for m in 0..rows {
        for n in 0..columns {
            let tile = ((m / 32) * (columns / 8) + n / 8) * 256;
            let at = tile + (n % 4) * 64 + (m % 16) * 4 + ((n % 8) / 4) * 2 + (m % 32) / 16;
            out.bytes[at] = scales.bytes[m * columns + n];
        }
    }
    out
}

/// Bytes of one expert's weight; rows are a multiple of 16, bytes per row of 32.
pub(super) fn shuffle_16x16(weight: &Tensor) -> Tensor {
    let [rows, columns] = weight.matrix();
    assert!(rows % 16 == 0 && columns % 32 == 0, "{rows} x {columns} bytes");
    let mut out = weight.clone();
    for n in 0..rows {
        for k in 0..columns {
            let tile = (n / 16) * 16 * columns + (k / 32) * 512;
            let at = tile + ((k % 32) / 16) * 256 + (n % 16) * 16 + k % 16;
            out.bytes[at] = weight.bytes[n * columns + k];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(rows: usize, columns: usize) -> Tensor {
        let bytes = (0..rows * columns).map(|i| i as u8).collect();
        Tensor::new("U8", &[rows, columns], bytes)
    }

    fn row_numbers(rows: usize) -> Tensor {
        Tensor::new("U8", &[rows, 1], (0..rows).map(|i| i as u8).collect())
    }

    /// The golden vector of the definition: 3 × 5 values 1..=15.
    #[test]
    fn small_scales_are_swizzled_and_padded() {
        let scales = Tensor::new("U8", &[3, 5], (1..=15).collect());
        let out = swizzle_128x4(&scales);
        assert_eq!(out.shape, [128, 8]);
        let filled: Vec<_> = out.bytes.iter().enumerate().filter(|(_, b)| **b != 0).collect();
        let want = [
            (0, 1),
            (1, 2),
            (2, 3),
            (3, 4),
            (16, 6),
            (17, 7),
            (18, 8),
            (19, 9),
            (32, 11),
            (33, 12),
            (34, 13),
            (35, 14),
            (512, 5),
            (528, 10),
            (544, 15),
        ];
        assert_eq!(filled, want.iter().map(|(at, b)| (*at, b)).collect::<Vec<_>>());
    }

    /// The golden vector of one whole tile: rows 0, 32, 64 and 96 lie side by side.
    #[test]
    fn one_tile_is_swizzled() {
        let values: Vec<u16> = (0..512).collect();
        let low = swizzle_128x4(&counting(128, 4));
        let high = Tensor::new("U8", &[128, 4], values.iter().map(|v| (v >> 8) as u8).collect());
        let high = swizzle_128x4(&high);
        let out: Vec<u16> =
            (0..20).map(|i| u16::from(low.bytes[i]) + 256 * u16::from(high.bytes[i])).collect();
        let want =
            [0, 1, 2, 3, 128, 129, 130, 131, 256, 257, 258, 259, 384, 385, 386, 387, 4, 5, 6, 7];
        assert_eq!(out, want);
    }

    /// The first 32 source rows of the row shuffle.
    #[test]
    fn rows_are_shuffled_in_blocks_of_32() {
        let out = shuffle_rows_32(&row_numbers(64)).bytes;
        let mut want = Vec::new();
        for a in 0..4u8 {
            want.extend((0..8u8).map(|b| 4 * b + a));
        }
        assert_eq!(want[..9], [0, 4, 8, 12, 16, 20, 24, 28, 1]);
        assert_eq!(out[..32], want);
        assert_eq!(out[32], 32);
    }

    /// The golden vector for 128 rows.
    #[test]
    fn halves_are_interleaved_and_shuffled() {
        let out = interleave_and_shuffle(&row_numbers(128)).bytes;
        let want = [
            0, 2, 4, 6, 8, 10, 12, 14, 64, 66, 68, 70, 72, 74, 76, 78, 1, 3, 5, 7, 9, 11, 13, 15,
            65, 67, 69, 71, 73, 75, 77, 79,
        ];
        assert_eq!(out[..32], want);
        assert_eq!(out[32], 16);
    }

    /// A block holds all rows of its columns.
    #[test]
    fn columns_become_blocks() {
        let out = column_blocks(&counting(3, 4), 2);
        assert_eq!(out.shape, [2, 3, 2]);
        assert_eq!(out.bytes, [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]);
    }

    /// The corners of one 32 × 8 tile, and the next tile to the right.
    #[test]
    fn e8m0_scales_are_shuffled() {
        let mut scales = Tensor::zeros("U8", &[256, 16]);
        for (value, (m, n)) in [(1, (0, 1)), (2, (1, 0)), (3, (16, 0)), (4, (0, 4)), (5, (0, 8))] {
            scales.bytes[m * 16 + n] = value;
        }
        let out = shuffle_e8m0(&scales).bytes;
        assert_eq!([64, 4, 1, 2, 256].map(|at: usize| out[at]), [1, 2, 3, 4, 5]);
    }

    /// The corners of one 16 × 32 tile, and the next tiles to the right and below.
    #[test]
    fn weights_are_shuffled_in_16x16() {
        let mut weight = Tensor::zeros("U8", &[32, 64]);
        for (value, (n, k)) in [(1, (0, 1)), (2, (1, 0)), (3, (0, 16)), (4, (0, 32)), (5, (16, 0))]
        {
            weight.bytes[n * 64 + k] = value;
        }
        let out = shuffle_16x16(&weight).bytes;
        assert_eq!([1, 16, 256, 512, 1024].map(|at: usize| out[at]), [1, 2, 3, 4, 5]);
    }

    /// Every byte goes somewhere, and no two to the same place.
    #[test]
    fn permutations_lose_nothing() {
        let values = counting(256, 64);
        let mut sorted = values.bytes.clone();
        sorted.sort_unstable();
        for out in [
            swizzle_128x4(&values),
            shuffle_rows_32(&values),
            interleave_and_shuffle(&values),
            column_blocks(&values, 16),
            shuffle_e8m0(&values),
            shuffle_16x16(&values),
        ] {
            let mut bytes = out.bytes;
            bytes.sort_unstable();
            assert_eq!(bytes, sorted);
        }
    }
}
