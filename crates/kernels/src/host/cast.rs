//! Conversions between element types, out of place. Floats round to nearest, ties to even, also to subnormals; what is too
//! large becomes infinity. Source: contract §4 "dtypes" for which pairs there are.

use longshore_models::Dtype;

use crate::host::{
    float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, f64_to_odd_f32},
    wide::widest,
};

/// Converts `source` (elements of `from`) into `target` (elements of `to`).
///
/// Returns whether the pair is known: BF16, F16, F32 and F64 to BF16, F16 and F32; I32 to I64.
///
/// # Panics
/// When the slices hold different numbers of elements.
pub fn cast(source: &[u8], from: Dtype, target: &mut [u8], to: Dtype) -> bool {
    widest(
        #[inline(always)]
        || convert(source, from, target, to),
    )
}

#[inline(always)]
fn convert(source: &[u8], from: Dtype, target: &mut [u8], to: Dtype) -> bool {
    match (from, to) {
        (Dtype::BF16, Dtype::F16) => {
            each(source, target, |b| f32_to_f16(bf16_to_f32(u16::from_le_bytes(b))).to_le_bytes());
        }
        (Dtype::BF16, Dtype::F32) => {
            each(source, target, |b| bf16_to_f32(u16::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F16, Dtype::BF16) => {
            each(source, target, |b| f32_to_bf16(f16_to_f32(u16::from_le_bytes(b))).to_le_bytes());
        }
        (Dtype::F16, Dtype::F32) => {
            each(source, target, |b| f16_to_f32(u16::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F32, Dtype::BF16) => {
            each(source, target, |b| f32_to_bf16(f32::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F32, Dtype::F16) => {
            each(source, target, |b| f32_to_f16(f32::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F64, Dtype::BF16) => {
            each(source, target, |b: [u8; 8]| {
                f32_to_bf16(f64_to_odd_f32(f64::from_le_bytes(b))).to_le_bytes()
            });
        }
        (Dtype::F64, Dtype::F16) => {
            each(source, target, |b: [u8; 8]| {
                f32_to_f16(f64_to_odd_f32(f64::from_le_bytes(b))).to_le_bytes()
            });
        }
        (Dtype::F64, Dtype::F32) => {
            each(source, target, |b: [u8; 8]| (f64::from_le_bytes(b) as f32).to_le_bytes());
        }
        (Dtype::I32, Dtype::I64) => {
            each(source, target, |b: [u8; 4]| i64::from(i32::from_le_bytes(b)).to_le_bytes());
        }
        _ => return false,
    }
    true
}

#[inline(always)]
fn each<const S: usize, const T: usize>(
    source: &[u8],
    target: &mut [u8],
    convert: impl Fn([u8; S]) -> [u8; T],
) {
    let (source, rest) = source.as_chunks::<S>();
    let (target, spare) = target.as_chunks_mut::<T>();
    assert!(
        rest.is_empty() && spare.is_empty() && source.len() == target.len(),
        "element counts differ"
    );
    for (from, to) in source.iter().zip(target) {
        *to = convert(*from);
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn f32_to_bf16(bits: u32) -> u16 {
        let mut out = [0; 2];
        assert!(cast(&bits.to_le_bytes(), Dtype::F32, &mut out, Dtype::BF16));
        u16::from_le_bytes(out)
    }

    #[test]
    fn ties_go_to_even() {
        assert_eq!(f32_to_bf16(0x3f80_8000), 0x3f80);
        assert_eq!(f32_to_bf16(0x3f81_8000), 0x3f82);
        assert_eq!(f32_to_bf16(0x3f80_8001), 0x3f81);
        assert_eq!(f32_to_bf16(0x7f7f_ffff), 0x7f80);
    }

    /// A little more than a tie in F64 is no tie, although it is one in F32.
    #[test]
    fn doubles_are_rounded_once() {
        let to = |dtype, x: f64| {
            let mut out = [0; 2];
            assert!(cast(&x.to_le_bytes(), Dtype::F64, &mut out, dtype));
            u16::from_le_bytes(out)
        };
        let little = 2f64.powi(-40);
        assert_eq!(to(Dtype::BF16, 1.0 + 2f64.powi(-8) + little), 0x3f81);
        assert_eq!(to(Dtype::BF16, 1.0 + 2f64.powi(-8)), 0x3f80);
        assert_eq!(to(Dtype::BF16, -1.0 - 2f64.powi(-8) - little), 0xbf81);
        assert_eq!(to(Dtype::F16, 1.0 + 2f64.powi(-11) + little), 0x3c01);
        assert_eq!(to(Dtype::F16, 65_519.999_999), 0x7bff);
        assert_eq!(to(Dtype::F16, 65_520.0), 0x7c00);
        assert_eq!(to(Dtype::BF16, 1e300), 0x7f80);
        assert_eq!(to(Dtype::BF16, -1e-300), 0x8000);
        assert_eq!(to(Dtype::F16, f64::NEG_INFINITY), 0xfc00);
        assert!(f16::from_bits(to(Dtype::F16, f64::NAN)).is_nan());
    }

    #[test]
    fn widening_is_exact_and_unknown_pairs_are_reported() {
        let mut out = [0; 4];
        assert!(cast(&0x4049u16.to_le_bytes(), Dtype::BF16, &mut out, Dtype::F32));
        assert_eq!(u32::from_le_bytes(out), 0x4049_0000);
        let mut out = [0; 8];
        assert!(cast(&(-5i32).to_le_bytes(), Dtype::I32, &mut out, Dtype::I64));
        assert_eq!(i64::from_le_bytes(out), -5);
        assert!(!cast(&[0; 4], Dtype::I32, &mut [0; 4], Dtype::F32));
    }

    /// Long enough for whole vectors and what is left of one: each element as if it stood alone.
    #[test]
    fn every_pair_converts_every_element() {
        use Dtype::{BF16, F16, F32, F64};
        let halves: Vec<u16> = (0..1037u32).map(|i| (i * 63) as u16).collect();
        let value = |dtype, i: usize| match dtype {
            BF16 => f64::from(bf16::from_bits(halves[i])),
            F16 => f64::from(f16::from_bits(halves[i])),
            F32 => f64::from(halves[i]) * 1.000_1 - 3e4,
            _ => f64::from(halves[i]) * 1.000_000_001 - 3e4,
        };
        let store = |dtype, value: f64| match dtype {
            BF16 => bf16::from_f32(f64_to_odd_f32(value)).to_le_bytes().to_vec(),
            F16 => f16::from_f32(f64_to_odd_f32(value)).to_le_bytes().to_vec(),
            F32 => (value as f32).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        };
        let is_nan = |dtype, bytes: &[u8]| match (dtype, bytes) {
            (BF16, [a, b]) => bf16::from_le_bytes([*a, *b]).is_nan(),
            (F16, [a, b]) => f16::from_le_bytes([*a, *b]).is_nan(),
            (_, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]).is_nan(),
            _ => false,
        };
        for (from, to) in [
            (BF16, F16),
            (BF16, F32),
            (F16, BF16),
            (F16, F32),
            (F32, BF16),
            (F32, F16),
            (F64, BF16),
            (F64, F16),
            (F64, F32),
        ] {
            let source: Vec<u8> =
                (0..halves.len()).flat_map(|i| store(from, value(from, i))).collect();
            let width = store(to, 0.0).len();
            let mut target = vec![0; halves.len() * width];
            assert!(cast(&source, from, &mut target, to));
            for (i, got) in target.chunks(width).enumerate() {
                let stored = &source[i * source.len() / halves.len()..];
                let exact = match from {
                    F32 => f64::from(f32::from_le_bytes(*stored.first_chunk().unwrap())),
                    _ => value(from, i),
                };
                let want = store(to, exact);
                let same = got == want || is_nan(to, got) && is_nan(to, &want);
                assert!(same, "{from} → {to}, {exact}: {got:?}, not {want:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "element counts differ")]
    fn sizes_must_agree() {
        cast(&[0; 8], Dtype::F32, &mut [0; 6], Dtype::BF16);
    }
}
