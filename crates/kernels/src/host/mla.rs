//! The MLA split: `kv_b_proj` by head into keys and values. Source: reference §4d; contract §2 and §4.

use half::{bf16, f16};
use longshore_models::Dtype;

use crate::host::float::{E2M1, E4M3, e8m0_to_f32};

/// A stored weight `[rows, cols]`, read row by row as BF16.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// BF16, F16 or F32 elements.
    Plain {
        /// The elements.
        data: &'a [u8],
        /// Their type.
        dtype: Dtype,
    },
    /// E4M3 elements with one F32 factor per 128×128 block; edge blocks are partial.
    Fp8 {
        /// `[rows, cols]` codes.
        data: &'a [u8],
        /// `[ceil(rows/128), ceil(cols/128)]` factors.
        scale: &'a [u8],
    },
    /// E2M1 pairs (low nibble first) with one E8M0 factor per 32 elements.
    Mxfp4 {
        /// `[rows, cols/2]` pairs.
        data: &'a [u8],
        /// `[rows, cols/32]` factors.
        scale: &'a [u8],
    },
}

impl Weight<'_> {
    /// Row `r` as BF16: F32(weight) · scale, rounded once.
    fn row(&self, r: usize, out: &mut [bf16]) {
        let cols = out.len();
        match *self {
            Weight::Plain { data, dtype: Dtype::F32 } => {
                let (row, _) = data[r * cols * 4..][..cols * 4].as_chunks::<4>();
                out.iter_mut()
                    .zip(row)
                    .for_each(|(o, b)| *o = bf16::from_f32(f32::from_le_bytes(*b)));
            }
            Weight::Plain { data, dtype } => {
                let (row, _) = data[r * cols * 2..][..cols * 2].as_chunks::<2>();
                let decode = |b: &[u8; 2]| match dtype {
                    Dtype::F16 => bf16::from_f32(f16::from_le_bytes(*b).to_f32()),
                    _ => bf16::from_le_bytes(*b),
                };
                out.iter_mut().zip(row).for_each(|(o, b)| *o = decode(b));
            }
            Weight::Fp8 { data, scale } => {
                let row = &data[r * cols..][..cols];
                let (scale, _) = scale.as_chunks::<4>();
                let factors = &scale[r / 128 * cols.div_ceil(128)..];
                for ((codes, out), factor) in row.chunks(128).zip(out.chunks_mut(128)).zip(factors)
                {
                    let factor = f32::from_le_bytes(*factor);
                    for (o, code) in out.iter_mut().zip(codes) {
                        *o = bf16::from_f32(E4M3[*code as usize] * factor);
                    }
                }
            }
            Weight::Mxfp4 { data, scale } => {
                let row = &data[r * cols / 2..][..cols / 2];
                let factors = &scale[r * cols / 32..][..cols / 32];
                for ((pairs, out), factor) in row.chunks(16).zip(out.chunks_mut(32)).zip(factors) {
                    let factor = e8m0_to_f32(*factor);
                    for (o, pair) in out.chunks_mut(2).zip(pairs) {
                        o[0] = bf16::from_f32(E2M1[usize::from(pair & 15)] * factor);
                        o[1] = bf16::from_f32(E2M1[usize::from(pair >> 4)] * factor);
                    }
                }
            }
        }
    }
}

/// Dimensions of a split on one rank.
#[derive(Debug, Clone, Copy)]
pub struct Dims {
    /// Heads.
    pub heads: usize,
    /// Key rows of a head (qk_nope_head_dim).
    pub dn: usize,
    /// Value rows of a head (v_head_dim).
    pub dv: usize,
    /// Columns (kv_lora_rank).
    pub kl: usize,
}

/// Rows that are transposed together: 64 bytes of output, a cache line.
const TILE: usize = 32;

/// Splits `weight` `[heads·(dn+dv), kl]` into `w_kc` `[heads, kl, dn]` and `w_vc` `[heads, dv, kl]`, both BF16.
///
/// # Panics
/// When a slice does not have the size that `dims` gives it.
pub fn split(weight: Weight<'_>, dims: Dims, w_kc: &mut [u8], w_vc: &mut [u8]) {
    let Dims { heads, dn, dv, kl } = dims;
    assert_eq!(w_kc.len(), heads * kl * dn * 2, "w_kc size");
    assert_eq!(w_vc.len(), heads * dv * kl * 2, "w_vc size");
    let mut tile = vec![bf16::ZERO; TILE * kl];
    for head in 0..heads {
        let first = head * (dn + dv);
        let keys = &mut w_kc[head * kl * dn * 2..][..kl * dn * 2];
        for d in (0..dn).step_by(TILE) {
            let count = TILE.min(dn - d);
            for (i, row) in tile.chunks_exact_mut(kl).take(count).enumerate() {
                weight.row(first + d + i, row);
            }
            for k in 0..kl {
                let out = &mut keys[(k * dn + d) * 2..][..count * 2];
                for (i, o) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *o = tile[i * kl + k].to_le_bytes();
                }
            }
        }
        let values = &mut w_vc[head * dv * kl * 2..][..dv * kl * 2];
        for (v, out) in values.chunks_exact_mut(kl * 2).enumerate() {
            weight.row(first + dn + v, &mut tile[..kl]);
            for (o, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(&tile) {
                *o = value.to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: Dims = Dims { heads: 2, dn: 3, dv: 2, kl: 5 };

    fn at(bytes: &[u8], i: usize) -> f32 {
        bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
    }

    /// Rows of a head are dn keys, then dv values; keys come out transposed.
    #[test]
    fn plain_weight_is_split_by_head() {
        let Dims { heads, dn, dv, kl } = DIMS;
        let values: Vec<f32> = (0..heads * (dn + dv) * kl).map(|i| i as f32).collect();
        let data: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let (mut kc, mut vc) = (vec![0; heads * kl * dn * 2], vec![0; heads * dv * kl * 2]);
        split(Weight::Plain { data: &data, dtype: Dtype::BF16 }, DIMS, &mut kc, &mut vc);
        for h in 0..heads {
            for k in 0..kl {
                for d in 0..dn {
                    let want = values[(h * (dn + dv) + d) * kl + k];
                    assert_eq!(at(&kc, (h * kl + k) * dn + d), want);
                }
                for v in 0..dv {
                    let want = values[(h * (dn + dv) + dn + v) * kl + k];
                    assert_eq!(at(&vc, (h * dv + v) * kl + k), want);
                }
            }
        }
    }

    /// GLM-5's heads have 448 rows, so 128-row blocks straddle them; here heads of 100 rows.
    #[test]
    fn fp8_blocks_may_straddle_heads_and_be_partial() {
        let dims = Dims { heads: 3, dn: 60, dv: 40, kl: 130 };
        let rows = dims.heads * (dims.dn + dims.dv);
        let data: Vec<u8> = (0..rows * dims.kl).map(|i| (i * 7 % 0x7f) as u8).collect();
        let factors: Vec<f32> = (0..rows.div_ceil(128) * 2).map(|i| 0.5 + i as f32).collect();
        let scale: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        let (mut kc, mut vc) = (
            vec![0; dims.heads * dims.kl * dims.dn * 2],
            vec![0; dims.heads * dims.dv * dims.kl * 2],
        );
        split(Weight::Fp8 { data: &data, scale: &scale }, dims, &mut kc, &mut vc);
        for r in 0..rows {
            let (h, inner) = (r / 100, r % 100);
            for k in 0..dims.kl {
                let exact = E4M3[data[r * dims.kl + k] as usize] * factors[r / 128 * 2 + k / 128];
                let want = bf16::from_f32(exact).to_f32();
                let got = match inner.checked_sub(dims.dn) {
                    None => at(&kc, (h * dims.kl + k) * dims.dn + inner),
                    Some(v) => at(&vc, (h * dims.dv + v) * dims.kl + k),
                };
                assert_eq!(got, want, "row {r} column {k}");
            }
        }
    }

    #[test]
    fn mxfp4_low_nibble_comes_first() {
        let dims = Dims { heads: 1, dn: 1, dv: 1, kl: 32 };
        let mut data = vec![0x21; 16];
        data.extend([0x97; 16]);
        let (mut kc, mut vc) = (vec![0; 64], vec![0; 64]);
        split(Weight::Mxfp4 { data: &data, scale: &[128, 126] }, dims, &mut kc, &mut vc);
        assert_eq!((at(&kc, 0), at(&kc, 1)), (1.0, 2.0));
        assert_eq!((at(&vc, 0), at(&vc, 1)), (3.0, -0.25));
    }
}
