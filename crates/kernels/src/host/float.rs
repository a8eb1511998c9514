//! Small floats: decoding E4M3, E2M1 and E8M0.

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
pub static E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// E8M0: 2^(code − 127); 255 is NaN. Source: OCP microscaling formats specification, §5.4.1.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
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
    fn e8m0_is_a_power_of_two() {
        assert_eq!(e8m0_to_f32(127), 1.0);
        assert_eq!(e8m0_to_f32(134), 128.0);
        assert_eq!(e8m0_to_f32(0), 2f32.powi(-127));
        assert!(e8m0_to_f32(255).is_nan());
    }
}
