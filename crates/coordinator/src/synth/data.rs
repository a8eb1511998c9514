//! Random weights: cheap, finite, of a plausible size.

use std::io::{self, Write};

use longshore_models::Dtype;

/// Writes `bytes` bytes of random elements; the same name and seed give the same bytes.
pub(super) fn write(
    out: &mut impl Write,
    name: &str,
    dtype: Dtype,
    bytes: u64,
    seed: u64,
) -> io::Result<()> {
    let (keep, set) = pattern(dtype, name);
    // FNV-1a: each tensor has a stream of its own
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let mut buffer = [0u8; 8192];
    let mut left = bytes;
    while left > 0 {
        for word in buffer.as_chunks_mut::<8>().0 {
            *word = (splitmix64(&mut state) & keep | set).to_le_bytes();
        }
        let count = left.min(buffer.len() as u64);
        out.write_all(&buffer[..count as usize])?;
        left -= count;
    }
    Ok(())
}

/// Which bits of eight random bytes stay, and which are set, so that the elements are finite and near a weight's size.
fn pattern(dtype: Dtype, name: &str) -> (u64, u64) {
    let scale = name.contains("scale");
    match dtype {
        // sign and mantissa random, exponent 2^-7
        Dtype::BF16 if !scale => (0x807f_807f_807f_807f, 0x3c00_3c00_3c00_3c00),
        Dtype::BF16 => (0x007f_007f_007f_007f, 0x3c00_3c00_3c00_3c00),
        Dtype::F16 => (0x83ff_83ff_83ff_83ff, 0x2000_2000_2000_2000),
        // positive, 2^-12: a block scale
        Dtype::F32 => (0x007f_ffff_007f_ffff, 0x3980_0000_3980_0000),
        // the top exponent bit clear: below 2, and no NaN
        Dtype::F8_E4M3 if !scale => (0xbfbf_bfbf_bfbf_bfbf, 0),
        Dtype::F8_E4M3 => (0x3f3f_3f3f_3f3f_3f3f, 0x0808_0808_0808_0808),
        // E8M0 near 2^-8
        Dtype::U8 if scale => (0x0707_0707_0707_0707, 0x7070_7070_7070_7070),
        _ => (u64::MAX, 0),
    }
}

/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
