//! The numbers: splitmix64 over a tensor's name, so that the same arguments give the same bytes
//! on every machine.

use sha2::{Digest, Sha256};

/// Endless 64-bit words that depend on `(seed, name)` only.
pub(super) fn words(seed: u64, name: &str) -> impl Iterator<Item = u64> {
    let digest = Sha256::digest(format!("{seed}|{name}"));
    let base = u64::from_le_bytes(digest[..8].try_into().expect("eight bytes"));
    (1u64..).map(move |i| {
        let mut z = base.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// `n` bytes of the words.
pub(super) fn random_bytes(seed: u64, name: &str, n: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        words(seed, name).take(n.div_ceil(8)).flat_map(u64::to_le_bytes).collect();
    bytes.truncate(n);
    bytes
}

/// `n` roughly normal numbers, mean 0, deviation 1: the sum of four 16-bit numbers each.
pub(super) fn bell(seed: u64, name: &str, n: usize) -> Vec<f64> {
    let one = |word: u64| {
        let sum: i64 = (0..4).map(|i| (word >> (16 * i) & 0xFFFF) as i64).sum();
        (sum - 2 * 65535) as f64 / 37837.0
    };
    words(seed, name).take(n).map(one).collect()
}

/// `n` numbers uniform in `[low, high)`.
pub(super) fn flat(seed: u64, name: &str, n: usize, low: f64, high: f64) -> Vec<f64> {
    let unit = 2f64.powi(-53);
    words(seed, name).take(n).map(|word| low + (word >> 11) as f64 * unit * (high - low)).collect()
}

/// Little-endian bytes of the values in a dtype; floats round to nearest even, integers truncate.
///
/// # Errors
/// A dtype that the generator does not write.
pub(super) fn encode(values: &[f64], dtype: &str) -> Result<Vec<u8>, String> {
    let bytes = match dtype {
        "F32" => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|v| f16_bits(*v).to_le_bytes()).collect(),
        "BF16" => values.iter().flat_map(|v| bf16_bits(*v as f32).to_le_bytes()).collect(),
        "I64" => values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
        "I32" => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
        other => return Err(format!("cannot write numbers as {other}")),
    };
    Ok(bytes)
}

/// Only for finite values, which is all that the generator makes.
fn bf16_bits(value: f32) -> u16 {
    let bits = u64::from(value.to_bits());
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// Only for values within F16's range, which is all that the generator makes.
fn f16_bits(value: f64) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let size = value.abs();
    if size < 2f64.powi(-14) {
        // subnormal: multiples of 2^-24; the carry into the first normal number is the right code
        return sign | (size * 2f64.powi(24)).round_ties_even() as u16;
    }
    let exponent = ((size.to_bits() >> 52) as i32) - 1023;
    let steps = (size * 2f64.powi(10 - exponent)).round_ties_even() as u32; // 1024..=2048
    sign | (((exponent + 14) as u32 * 1024) + steps) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes of F16 read off IEEE 754's tables.
    #[test]
    fn f16_codes_are_right() {
        let codes = [1.0, -2.0, 0.1, 65504.0, 2f64.powi(-24), 2f64.powi(-14), 1.0 + 2f64.powi(-11)];
        let want = [0x3C00, 0xC000, 0x2E66, 0x7BFF, 0x0001, 0x0400, 0x3C00];
        assert_eq!(codes.map(f16_bits), want);
    }
}
