//! Number formats, decoded and rounded by arithmetic rather than by tables.
//!
//! **Source:** OCP OFP8 (E4M3: bias 7, no infinity, S.1111.111 is NaN) and OCP MX 1.0 (E2M1: bias 1;
//! E8M0: 2^(byte − 127), 255 is NaN).

/// The numbers of a float tensor.
pub(super) fn decode_floats(dtype: &str, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        "F32" => four(bytes).map(f32::from_le_bytes).collect(),
        "BF16" => two(bytes).map(|b| bf16(u16::from_le_bytes(b))).collect(),
        "F16" => two(bytes).map(|b| f16(u16::from_le_bytes(b))).collect(),
        other => panic!("{other} is no float that a checkpoint leaves unquantised"),
    }
}

/// Little-endian bytes of the numbers, each rounded once to nearest even.
pub(super) fn encode_floats(dtype: &str, values: &[f32]) -> Vec<u8> {
    match dtype {
        "F32" => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        "BF16" => values.iter().flat_map(|v| to_bf16(*v).to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|v| to_f16(*v).to_le_bytes()).collect(),
        other => panic!("{other} is no float that a model computes in"),
    }
}

fn two(bytes: &[u8]) -> impl Iterator<Item = [u8; 2]> {
    bytes.chunks_exact(2).map(|b| [b[0], b[1]])
}

fn four(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

/// BF16 is the upper half of F32.
fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To nearest, ties to even; a NaN stays one.
pub(super) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let upper = (bits >> 16) as u16;
    if value.is_nan() {
        return upper & 0x8000 | 0x7FC0;
    }
    let lower = bits & 0xFFFF;
    let up = lower > 0x8000 || (lower == 0x8000 && upper % 2 == 1);
    upper + u16::from(up) // a carry out of the mantissa is the next exponent, as it should be
}

fn f16(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
    match exponent {
        0 => sign * mantissa * 2f32.powi(-24),
        31 if mantissa == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        e => sign * (1.0 + mantissa / 1024.0) * 2f32.powi(e - 15),
    }
}

fn to_f16(value: f32) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let size = f64::from(value.abs());
    if value.is_nan() {
        return sign | 0x7E00;
    }
    if size >= 65520.0 {
        return sign | 0x7C00; // halfway between the largest number and 2^16 rounds to infinity
    }
    // one unit in the last place: 2^-24 for subnormals, else 2^(exponent - 10)
    let exponent = if size < 2f64.powi(-14) { -14 } else { size.log2().floor() as i32 };
    let units = (size / 2f64.powi(exponent - 10)).round_ties_even() as i32;
    sign | ((exponent + 14) * 1024 + units) as u16
}

/// The number of an F8_E4M3 code.
pub(super) fn e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match exponent {
        15 if mantissa == 7.0 => f32::NAN,
        0 => sign * mantissa / 8.0 * 2f32.powi(-6),
        e => sign * (1.0 + mantissa / 8.0) * 2f32.powi(e - 7),
    }
}

/// The number of an E2M1 code: 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.
pub(super) fn e2m1(code: u8) -> f32 {
    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
    sign * [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)]
}

/// The scale of an E8M0 byte: 2^(byte − 127).
pub(super) fn e8m0(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal
        other => f32::from_bits(u32::from(other) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ties go to the even code; a carry reaches the exponent; infinity and NaN stay themselves.
    #[test]
    fn bf16_rounds_to_nearest_even() {
        let codes = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3FFF_FFFF, 0x7F80_0000, 0xFF80_0001];
        let want = [0x3F80, 0x3F82, 0x3F81, 0x4000, 0x7F80, 0xFFC0];
        assert_eq!(codes.map(|bits| to_bf16(f32::from_bits(bits))), want);
    }

    /// Every F16 code survives the way to F32 and back.
    #[test]
    fn f16_round_trips() {
        for code in 0..=u16::MAX {
            let value = f16(code);
            if !value.is_nan() {
                assert_eq!(to_f16(value), code, "{code:#06x} is {value}");
            }
        }
    }

    /// Ties between two F16 numbers go to the even one.
    #[test]
    fn f16_rounds_to_nearest_even() {
        let values = [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 65519.0, 2f32.powi(-25)];
        assert_eq!(values.map(to_f16), [0x3C00, 0x3C02, 0x7BFF, 0x0000]);
    }

    /// The numbers that the format's specification lists.
    #[test]
    fn e4m3_decodes() {
        let codes = [0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xFE, 0x80];
        let want =
            [0.0, 2f32.powi(-9), 7.0 * 2f32.powi(-9), 2f32.powi(-6), 1.0, 448.0, -448.0, 0.0];
        assert_eq!(codes.map(e4m3), want);
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan());
    }

    /// All sixteen codes.
    #[test]
    fn e2m1_decodes() {
        let positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for (code, value) in positive.into_iter().enumerate() {
            assert_eq!(e2m1(code as u8), value);
            assert_eq!(e2m1(code as u8 + 8), -value);
        }
    }

    /// One is byte 127; byte 134 is 128 and no NaN.
    #[test]
    fn e8m0_decodes() {
        assert_eq!(
            [127, 134, 126, 1, 254].map(e8m0),
            [1.0, 128.0, 0.5, 2f32.powi(-126), 2f32.powi(127)]
        );
        assert_eq!(f64::from(e8m0(0)), 2f64.powi(-127));
        assert!(e8m0(255).is_nan());
    }
}
