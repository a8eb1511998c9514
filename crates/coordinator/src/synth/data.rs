//! Random weights: cheap, finite, of a plausible size.

use std::io::{self, Write};

use longshore_models::Dtype;

use crate::synth::tensors::SynthTensor;

/// Writes the elements of a tensor; the same name and seed give the same bytes.
pub(super) fn write(out: &mut impl Write, tensor: &SynthTensor, seed: u64) -> io::Result<()> {
    if let Some(numbers) = tensor.holds {
        for number in numbers {
            out.write_all(&number.to_le_bytes())?;
        }
        return Ok(());
    }
    let (keep, set) = pattern(tensor.dtype, &tensor.name);
    let mut state = stream(&tensor.name, seed);
    let mut buffer = [0u8; 8192];
    let mut left = tensor.bytes;
    while left > 0 {
        let count = left.min(buffer.len() as u64) as usize;
        for word in buffer[..count.next_multiple_of(8)].as_chunks_mut::<8>().0 {
            *word = (splitmix64(&mut state) & keep | set).to_le_bytes();
        }
        out.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    Ok(())
}

/// Each tensor has a stream of its own (FNV-1a of its name); the parts of a fused layer see the same input, so their
/// input scales are the same number.
fn stream(name: &str, seed: u64) -> u64 {
    let partner = |part: &str| match part {
        "up_proj" => "gate_proj".to_owned(),
        "k_proj" | "v_proj" => "q_proj".to_owned(),
        "kv_a_proj_with_mqa" => "q_a_proj".to_owned(),
        _ => part.to_owned(),
    };
    let name = match name.ends_with(".input_scale") {
        true => name.split('.').map(partner).collect::<Vec<_>>().join("."),
        false => name.to_owned(),
    };
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325 ^ seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// Which bits of eight random bytes stay, and which are set, so that the elements are finite and near a weight's size;
/// scales are positive.
fn pattern(dtype: Dtype, name: &str) -> (u64, u64) {
    let scale = name.contains("scale");
    match dtype {
        // sign and mantissa random, exponent 2^-7
        Dtype::BF16 if !scale => (0x807f_807f_807f_807f, 0x3c00_3c00_3c00_3c00),
        Dtype::BF16 => (0x007f_007f_007f_007f, 0x3c00_3c00_3c00_3c00),
        Dtype::F16 => (0x83ff_83ff_83ff_83ff, 0x2000_2000_2000_2000),
        Dtype::F32 if !scale => (0x807f_ffff_807f_ffff, 0x3c00_0000_3c00_0000),
        // of activations 2^-8, of a KV cache 1
        Dtype::F32 if name.ends_with(".input_scale") => {
            (0x007f_ffff_007f_ffff, 0x3b80_0000_3b80_0000)
        }
        Dtype::F32 if name.ends_with(".k_scale") || name.ends_with(".v_scale") => {
            (0x007f_ffff_007f_ffff, 0x3f80_0000_3f80_0000)
        }
        // 2^-12: a block scale, or that of a whole weight
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
