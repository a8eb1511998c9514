//! The MLA split: `kv_b_proj` by head into keys and values. Source: reference §4d; contract §2 and §4.
//!
//! Out of place, through a tile of 32 rows (32 KiB for 512 columns) of its own. Quantised weights are dequantised on the
//! way, by looking products up: 1.1 → 4.6 GB/s for FP8 and 0.8 → 4.0 for MXFP4, one thread, against the same arithmetic for
//! every element, which the compiler does turn into vectors. The split runs on the weight as it was loaded, before anything
//! else changes it (reference §0.4).

use longshore_models::Dtype;

use crate::host::float::{E2M1_E8M0, E4M3, f16_to_f32, f32_to_bf16, product};

/// The two bytes of a BF16.
type Bf16 = [u8; 2];

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
    fn assert_shape(&self, rows: usize, cols: usize) {
        let elements = rows * cols;
        match self {
            Weight::Plain { data, dtype } => {
                let bytes = if *dtype == Dtype::F32 { 4 } else { 2 };
                assert_eq!(data.len(), elements * bytes, "weight size");
            }
            Weight::Fp8 { data, scale } => {
                let blocks = rows.div_ceil(128) * cols.div_ceil(128);
                assert_eq!((data.len(), scale.len()), (elements, blocks * 4), "weight, scale size");
            }
            Weight::Mxfp4 { data, scale } => {
                assert_eq!(cols % 32, 0, "groups of 32 elements");
                let sizes = (elements / 2, elements / 32);
                assert_eq!((data.len(), scale.len()), sizes, "weight, scale size");
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

/// Rows that are transposed together: 64 bytes of `w_kc`, a cache line.
const TILE_ROWS: usize = 32;

/// Splits `weight` `[heads·(dn+dv), kl]` into `w_kc` `[heads, kl, dn]` and `w_vc` `[heads, dv, kl]`, both BF16.
///
/// Rows of a head are `dn` keys, which come out transposed, then `dv` values. Keys go by way of a tile of 32 rows, which
/// stays in the first-level cache (32 KiB for 512 columns), so that `w_kc` is written by whole cache lines.
///
/// # Panics
/// When a slice does not have the size that `dims` gives it, or the columns of an MXFP4 weight are no multiple of 32.
pub fn split(weight: Weight<'_>, dims: Dims, w_kc: &mut [u8], w_vc: &mut [u8]) {
    let Dims { heads, dn, dv, kl } = dims;
    assert_eq!(w_kc.len(), heads * kl * dn * 2, "w_kc size");
    assert_eq!(w_vc.len(), heads * dv * kl * 2, "w_vc size");
    weight.assert_shape(heads * (dn + dv), kl);
    if kl == 0 {
        return;
    }
    let mut rows = Rows { weight, cols: kl, block: None, tables: Vec::new() };
    let mut tile = vec![[[0; 2]; TILE_ROWS]; kl];
    for head in 0..heads {
        let first = head * (dn + dv);
        let (keys, _) = w_kc[head * kl * dn * 2..][..kl * dn * 2].as_chunks_mut::<2>();
        for d in (0..dn).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(dn - d);
            for i in 0..count {
                rows.decode(first + d + i, &mut tile, |column| &mut column[i]);
            }
            for (column, key) in tile.iter().zip(keys.chunks_exact_mut(dn)) {
                match key[d..].first_chunk_mut() {
                    Some(line) => *line = *column,
                    None => key[d..].copy_from_slice(&column[..count]),
                }
            }
        }
        let (values, _) = w_vc[head * dv * kl * 2..][..dv * kl * 2].as_chunks_mut::<2>();
        for (v, out) in values.chunks_exact_mut(kl).enumerate() {
            rows.decode(first + dn + v, out, |out| out);
        }
    }
}

/// Decodes the rows of a weight.
struct Rows<'a> {
    weight: Weight<'a>,
    cols: usize,
    /// The 128 rows that `tables` are of.
    block: Option<usize>,
    /// BF16 of each FP8 code in each 128 columns, factor included.
    tables: Vec<[Bf16; 256]>,
}

impl Rows<'_> {
    /// Row `r` as BF16, F32(weight) · scale rounded once, into the place that each of `out` has for it.
    fn decode<T>(&mut self, r: usize, out: &mut [T], place: impl Fn(&mut T) -> &mut Bf16) {
        let cols = self.cols;
        match self.weight {
            Weight::Plain { data, dtype: Dtype::F32 } => {
                let (row, _) = data[r * cols * 4..][..cols * 4].as_chunks::<4>();
                for (out, bytes) in out.iter_mut().zip(row) {
                    *place(out) = f32_to_bf16(f32::from_le_bytes(*bytes)).to_le_bytes();
                }
            }
            Weight::Plain { data, dtype: Dtype::F16 } => {
                let (row, _) = data[r * cols * 2..][..cols * 2].as_chunks::<2>();
                for (out, bytes) in out.iter_mut().zip(row) {
                    let value = f16_to_f32(u16::from_le_bytes(*bytes));
                    *place(out) = f32_to_bf16(value).to_le_bytes();
                }
            }
            Weight::Plain { data, .. } => {
                let (row, _) = data[r * cols * 2..][..cols * 2].as_chunks::<2>();
                for (out, bytes) in out.iter_mut().zip(row) {
                    *place(out) = *bytes;
                }
            }
            Weight::Fp8 { data, scale } => {
                self.tabulate(scale, r / 128);
                let row = &data[r * cols..][..cols];
                let columns = row.chunks(128).zip(out.chunks_mut(128)).zip(&self.tables);
                for ((codes, out), table) in columns {
                    for (code, out) in codes.iter().zip(out) {
                        *place(out) = table[usize::from(*code)];
                    }
                }
            }
            Weight::Mxfp4 { data, scale } => {
                let (row, _) = data[r * cols / 2..][..cols / 2].as_chunks::<16>();
                let (groups, _) = out.as_chunks_mut::<32>();
                for ((pairs, out), factor) in row.iter().zip(groups).zip(&scale[r * cols / 32..]) {
                    let table = &E2M1_E8M0[usize::from(*factor)];
                    for (pair, [low, high]) in pairs.iter().zip(out.as_chunks_mut::<2>().0) {
                        *place(low) = table[usize::from(pair & 15)];
                        *place(high) = table[usize::from(pair >> 4)];
                    }
                }
            }
        }
    }

    /// Sees to it that `tables` are those of `block`: 256 products for its 16384 elements.
    fn tabulate(&mut self, scale: &[u8], block: usize) {
        if self.block == Some(block) {
            return;
        }
        let columns = self.cols.div_ceil(128);
        let (factors, _) = scale[block * columns * 4..][..columns * 4].as_chunks::<4>();
        self.tables.clear();
        self.tables.extend(factors.iter().map(|factor| {
            let factor = f32::from_le_bytes(*factor);
            E4M3.map(|value| f32_to_bf16(product(value, factor)).to_le_bytes())
        }));
        self.block = Some(block);
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::host::float::{E2M1, e8m0_to_f32};

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
                let exact =
                    E4M3[usize::from(data[r * dims.kl + k])] * factors[r / 128 * 2 + k / 128];
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
    #[should_panic(expected = "weight, scale size")]
    fn a_scale_of_another_size_is_refused() {
        let weight = Weight::Fp8 { data: &[0; 25], scale: &[0; 8] };
        split(weight, Dims { heads: 1, ..DIMS }, &mut [0; 30], &mut [0; 20]);
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

    /// More rows than a tile and fewer, in every form that a weight can have, against element by element.
    #[test]
    fn every_form_is_decoded_and_split() {
        let dims = Dims { heads: 2, dn: 40, dv: 9, kl: 64 };
        let (rows, kl) = (dims.heads * (dims.dn + dims.dv), dims.kl);
        let data: Vec<u8> = (0..rows * kl * 4).map(|i| (i * 89 % 241) as u8).collect();
        let factors: Vec<u8> = [0.75f32].iter().flat_map(|f| f.to_le_bytes()).collect();
        let exponents: Vec<u8> = (0..rows * kl / 32).map(|i| 100 + (i % 50) as u8).collect();
        let elements = rows * kl;
        let halves = |dtype| Weight::Plain { data: &data[..elements * 2], dtype };
        let forms: [(Weight<'_>, &dyn Fn(usize) -> f32); 5] = [
            (halves(Dtype::BF16), &|i| at(&data, i)),
            (halves(Dtype::F16), &|i| f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32()),
            (Weight::Plain { data: &data, dtype: Dtype::F32 }, &|i| {
                f32::from_le_bytes(*data[4 * i..].first_chunk().unwrap())
            }),
            (Weight::Fp8 { data: &data[..elements], scale: &factors }, &|i| {
                E4M3[usize::from(data[i])] * 0.75
            }),
            (Weight::Mxfp4 { data: &data[..elements / 2], scale: &exponents }, &|i| {
                let code = data[i / 2] >> (i % 2 * 4) & 15;
                E2M1[usize::from(code)] * e8m0_to_f32(exponents[i / 32])
            }),
        ];
        for (weight, element) in forms {
            let mut kc = vec![0; dims.heads * kl * dims.dn * 2];
            let mut vc = vec![0; dims.heads * dims.dv * kl * 2];
            split(weight, dims, &mut kc, &mut vc);
            for (r, k) in (0..rows).flat_map(|r| (0..kl).map(move |k| (r, k))) {
                let want = bf16::from_f32(element(r * kl + k)).to_f32();
                let (h, inner) = (r / (dims.dn + dims.dv), r % (dims.dn + dims.dv));
                let got = match inner.checked_sub(dims.dn) {
                    None => at(&kc, (h * kl + k) * dims.dn + inner),
                    Some(v) => at(&vc, (h * dims.dv + v) * kl + k),
                };
                assert!(got == want || got.is_nan() && want.is_nan(), "{weight:?} ({r}, {k})");
            }
        }
    }
}
