//! Small floats: E4M3, E2M1 and E8M0 as values and tables, and conversions between F16, BF16 and F32.
//!
//! The conversions are selections between integer expressions, without branches, so that loops over them become vector
//! instructions of whatever they are compiled for. In them NaNs become quiet and keep sign and leading payload bits.

/// E4M3 (no infinities; 0x7f and 0xff are NaN). Source: OCP 8-bit floating point specification, table 1.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 0xf) as i32, (code & 7) as u32);
    let magnitude = if code & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        // 1.mmm · 2^(exponent − 7), put together as an f32
        f32::from_bits(((exponent + 120) as u32) << 23 | mantissa << 20)
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// [`e4m3_to_f32`] of every code.
pub static E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3_to_f32(code as u8);
        code += 1;
    }
    table
};

/// E2M1: codes 0 to 7, bit 3 is the sign. Source: reference §0.3.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// E8M0: 2^(code − 127); 255 is NaN. Source: OCP microscaling formats specification, §5.4.1.
pub const fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// The two bytes of the BF16 nearest to [`E2M1`] · [`e8m0_to_f32`], by factor and code.
pub static E2M1_E8M0: [[[u8; 2]; 16]; 256] = {
    let mut table = [[[0; 2]; 16]; 256];
    let mut factor = 0;
    while factor < 256 {
        let mut code = 0;
        while code < 16 {
            let value = product(E2M1[code], e8m0_to_f32(factor as u8));
            table[factor][code] = f32_to_bf16(value).to_le_bytes();
            code += 1;
        }
        factor += 1;
    }
    table
};

/// `a`·`b`, rounded once. Which NaN: that of `a`, else that of `b`, made quiet; where neither is one, [`f32::NAN`].
///
/// The language leaves it open, and processors differ; a CUDA kernel has to give the same.
#[inline]
pub const fn product(a: f32, b: f32) -> f32 {
    const QUIET: u32 = 1 << 22;
    let product = a * b;
    if a.is_nan() {
        f32::from_bits(a.to_bits() | QUIET)
    } else if b.is_nan() {
        f32::from_bits(b.to_bits() | QUIET)
    } else if product.is_nan() {
        f32::NAN
    } else {
        product
    }
}

/// BF16 of the bits `half`; exact.
#[inline]
pub const fn bf16_to_f32(half: u16) -> f32 {
    let quiet = if half & 0x7fff > 0x7f80 { 0x40 } else { 0 };
    f32::from_bits(((half | quiet) as u32) << 16)
}

/// Bits of the BF16 nearest to `x`, ties to even.
#[inline]
pub const fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let nan = bits | 0x40 << 16;
    let chosen = if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { nearest };
    (chosen >> 16) as u16
}

/// F16 of the bits `half`; exact.
#[inline]
pub const fn f16_to_f32(half: u16) -> f32 {
    let (sign, magnitude) = (((half & 0x8000) as u32) << 16, (half & 0x7fff) as u32);
    // the exponent moved from bias 15 to 127
    let normal = (magnitude << 13) + (112 << 23);
    let subnormal =
        (f32::from_bits(magnitude << 13 | 113 << 23) - f32::from_bits(113 << 23)).to_bits();
    let quiet = if magnitude > 0x7c00 { 1 << 22 } else { 0 };
    let infinite_or_nan = magnitude << 13 | 255 << 23 | quiet;
    let finite = if magnitude < 0x400 { subnormal } else { normal };
    f32::from_bits(if magnitude < 0x7c00 { finite } else { infinite_or_nan } | sign)
}

/// Bits of the F16 nearest to `x`, ties to even; from 65520 on that is infinity.
#[inline]
pub const fn f32_to_f16(x: f32) -> u16 {
    let (sign, bits) = ((x.to_bits() >> 16 & 0x8000) as u16, x.to_bits() & 0x7fff_ffff);
    // the exponent moved from bias 127 to 15, rounded; beyond 65504 the carry makes infinity
    let normal = bits.wrapping_sub(112 << 23).wrapping_add(0xfff + (bits >> 13 & 1)) >> 13;
    // next to 0.5 an F32 is a multiple of 2^−24, which is F16's smallest step: the addition rounds
    let subnormal = (f32::from_bits(bits) + 0.5).to_bits() - 0.5f32.to_bits();
    let nan = 0x7e00 | (bits >> 13 & 0x3ff);
    let small = if bits < 113 << 23 { subnormal } else { normal };
    let large = if bits > 255 << 23 { nan } else { 0x7c00 };
    // 143 is the exponent of 65536
    sign | if bits < 143 << 23 { small } else { large } as u16
}

/// F64 to F32, rounded to odd: towards zero, and to an odd last bit when anything was lost.
///
/// A second rounding, to a type with at least two bits less, then gives what one rounding of the F64 would give. Source:
/// Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
pub fn f64_to_odd_f32(x: f64) -> f32 {
    let nearest = x as f32;
    if x.is_nan() || f64::from(nearest) == x {
        return nearest;
    }
    // the bits of floats of one sign are in the order of their magnitudes
    let beyond = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(beyond)) | 1)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn e4m3_has_the_values_of_the_standard() {
        for (code, value) in
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0)]
        {
            assert_eq!(E4M3[code], value);
            assert_eq!(E4M3[code | 0x80], -value);
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
    }

    #[test]
    fn products_have_defined_nans() {
        let (first, second) = (f32::from_bits(0xff80_0005), f32::from_bits(0x7fc0_0007));
        assert_eq!(product(first, second).to_bits(), 0xffc0_0005);
        assert_eq!(product(second, first).to_bits(), 0x7fc0_0007);
        assert_eq!(product(2.0, first).to_bits(), 0xffc0_0005);
        assert_eq!(product(f32::INFINITY, 0.0).to_bits(), 0x7fc0_0000);
        assert_eq!(product(-0.5, 3.0), -1.5);
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!(e8m0_to_f32(127), 1.0);
        assert_eq!(e8m0_to_f32(134), 128.0);
        assert_eq!(e8m0_to_f32(0), 2f32.powi(-127));
        assert!(e8m0_to_f32(255).is_nan());
    }

    /// The smallest factor gives subnormal BF16s, the largest infinity, 255 NaN.
    #[test]
    fn scaled_e2m1_is_the_rounded_product() {
        for (factor, codes) in E2M1_E8M0.iter().enumerate() {
            for (code, bytes) in codes.iter().enumerate() {
                let got = bf16::from_le_bytes(*bytes);
                let want = bf16::from_f32(E2M1[code] * e8m0_to_f32(factor as u8));
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{code} · 2^({factor} − 127) is {want}, not {got}");
            }
        }
    }

    #[test]
    fn every_half_widens_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            assert_eq!(f16_to_f32(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits());
            assert_eq!(bf16_to_f32(bits).to_bits(), bf16::from_bits(bits).to_f32().to_bits());
        }
    }

    fn narrows_as_the_half_crate_says(bits: u32) {
        let value = f32::from_bits(bits);
        assert_eq!(f32_to_f16(value), f16::from_f32(value).to_bits(), "F16 of {bits:#x}");
        assert_eq!(f32_to_bf16(value), bf16::from_f32(value).to_bits(), "BF16 of {bits:#x}");
    }

    /// All signs, exponents and leading bits, with what decides a rounding below them.
    #[test]
    fn rounding_is_to_nearest_even() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x7fff, 0x8000, 0x8001, 0xffff]
            {
                narrows_as_the_half_crate_says(u32::from(high) << 16 | low);
            }
        }
    }

    proptest! {
        #[test]
        fn any_value_narrows_as_the_half_crate_says(bits: u32) {
            narrows_as_the_half_crate_says(bits);
        }
    }
}
