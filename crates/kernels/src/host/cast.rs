//! Conversions between element types. Floats round to nearest, ties to even.

use half::{bf16, f16};
use longshore_models::Dtype;

/// Converts `source` (elements of `from`) into `target` (elements of `to`).
///
/// Returns whether the pair is known: BF16, F16, F32 and F64 to BF16, F16 and F32; I32 to I64.
///
/// # Panics
/// When the slices hold different numbers of elements.
pub fn cast(source: &[u8], from: Dtype, target: &mut [u8], to: Dtype) -> bool {
    match (from, to) {
        (Dtype::BF16, Dtype::F16) => {
            each(source, target, |b: [u8; 2]| {
                f16::from_f32(bf16::from_le_bytes(b).to_f32()).to_le_bytes()
            });
        }
        (Dtype::BF16, Dtype::F32) => {
            each(source, target, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32().to_le_bytes());
        }
        (Dtype::F16, Dtype::BF16) => {
            each(source, target, |b: [u8; 2]| {
                bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_le_bytes()
            });
        }
        (Dtype::F16, Dtype::F32) => {
            each(source, target, |b: [u8; 2]| f16::from_le_bytes(b).to_f32().to_le_bytes());
        }
        (Dtype::F32, Dtype::BF16) => {
            each(source, target, |b: [u8; 4]| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F32, Dtype::F16) => {
            each(source, target, |b: [u8; 4]| f16::from_f32(f32::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F64, Dtype::BF16) => {
            each(source, target, |b: [u8; 8]| bf16::from_f64(f64::from_le_bytes(b)).to_le_bytes());
        }
        (Dtype::F64, Dtype::F16) => {
            each(source, target, |b: [u8; 8]| f16::from_f64(f64::from_le_bytes(b)).to_le_bytes());
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
}
