//! The MLA split.

use crate::host::mla::Dims;

use super::table::{Device, Grid, kernel};

/// Declares the split of one form of weight.
macro_rules! split {
    ($(#[$doc:meta])* $kernel:ident = $entry:literal $(, $scale:ident)?) => {
        kernel! {
            $(#[$doc])*
            $kernel = $entry in include_str!("../../ptx/mla.ptx"), 256, synchronises;
            /// `[heads·(dn+dv), kl]`, elements aligned.
            data: u64,
            $(
                /// Its factors, aligned.
                $scale: u64,
            )?
            /// `[heads, kl, dn]`, BF16.
            w_kc: u64,
            /// `[heads, dv, kl]`, BF16.
            w_vc: u64,
            /// Heads.
            heads: u32,
            /// Key rows of a head.
            dn: u32,
            /// Value rows of a head.
            dv: u32,
            /// Columns.
            kl: u32,
        }
    };
}

split!(
    /// Of a BF16 weight.
    Bf16 = "mla_split_bf16"
);
split!(
    /// Of an F16 weight.
    F16 = "mla_split_f16"
);
split!(
    /// Of an F32 weight.
    F32 = "mla_split_f32"
);
split!(
    /// Of an E4M3 weight with one F32 factor per 128×128 block.
    Fp8 = "mla_split_fp8",
    scale
);
split!(
    /// Of an MXFP4 weight: E2M1 pairs, one E8M0 factor per 32 columns.
    Mxfp4 = "mla_split_mxfp4",
    scale
);

/// The launch of a split: a block of threads for each 32×32 elements of a head's keys and values.
pub fn grid(dims: Dims, device: Device) -> Grid {
    let tiles = |n: usize| n.div_ceil(32) as u64;
    let all = (dims.heads as u64)
        .saturating_mul(tiles(dims.dn) + tiles(dims.dv))
        .saturating_mul(tiles(dims.kl));
    device.grid_of_bands(all, 256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_a_tile() {
        let dims = Dims { heads: 3, dn: 33, dv: 31, kl: 65 };
        assert_eq!(grid(dims, Device { multiprocessors: 8 }).blocks, 3 * (2 + 1) * 3);
    }
}
