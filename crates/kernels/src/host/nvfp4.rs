//! The scalars that NVFP4 layers derive from their per-tensor scales: F32, one rounding per operation.
//!
//! Source: reference §4a and §4b for what is computed, contract §4 "numbers" for how it is rounded. Whoever drives a
//! layer decides which scales belong together (the slots of a linear layer, an expert, or all experts of a layer).

pub use crate::host::float::product;

/// The largest of `values`: `max(input_scale)` and `max(weight_scale_2)` over the slots of a layer.
///
/// The fold starts at −∞, which is therefore the maximum of nothing; NaNs are passed over, and the first of equals wins
/// (of a zero and a negative zero, say, which [`f32::max`] leaves open).
pub fn maximum(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |largest, x| if *x > largest { *x } else { largest })
}

/// `alpha` = max(`input_scale`) · max(`scale_2`): what the product of two scaled FP4 matrices is multiplied by.
///
/// Shards whose own scale is smaller than the maximum are not rescaled (reference §4a, step 1).
pub fn alpha(input_scale: &[f32], scale_2: &[f32]) -> f32 {
    product(maximum(input_scale), maximum(scale_2))
}

/// 1/x, correctly rounded: `input_scale_inv` and `*_input_scale_quant`.
///
/// IEEE division, never an estimate with a Newton step; 1/0 is ∞, and a NaN stays itself, made quiet.
pub fn inverse(x: f32) -> f32 {
    if x.is_nan() { product(x, x) } else { 1.0 / x }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_larger_slot_wins_on_both_sides() {
        assert_eq!(maximum(&[0.25, 3.5, 1.0]), 3.5);
        assert_eq!(alpha(&[0.25, 0.5], &[3.0, 2.0]), 1.5);
        assert_eq!(alpha(&[0.1], &[0.3]).to_bits(), (0.1f32 * 0.3f32).to_bits());
    }

    /// A scale is positive in a sound checkpoint; what an unsound one gives is at least defined.
    #[test]
    fn odd_values_have_defined_results() {
        assert_eq!(maximum(&[]), f32::NEG_INFINITY);
        assert_eq!(maximum(&[-2.0, -1.0]), -1.0);
        assert_eq!(maximum(&[f32::NAN, 1.0, f32::NAN]), 1.0);
        assert_eq!(maximum(&[f32::NAN]), f32::NEG_INFINITY);
        assert_eq!(maximum(&[-0.0, 0.0]).to_bits(), (-0.0f32).to_bits());
        assert_eq!(inverse(0.0), f32::INFINITY);
        assert_eq!(inverse(f32::INFINITY), 0.0);
    }

    proptest! {
        /// 53 bits are more than twice 24 and two to spare, so a quotient rounded to F64 first rounds right to F32.
        #[test]
        fn inverse_is_correctly_rounded(x in proptest::num::f32::NORMAL) {
            prop_assert_eq!(inverse(x).to_bits(), ((1.0 / f64::from(x)) as f32).to_bits());
        }

        /// 24 + 24 bits fit into 53: the product in F64 is exact, and rounded once.
        #[test]
        fn alpha_is_rounded_once(a in 1e-9f32..1e9, b in 1e-9f32..1e9) {
            let want = (f64::from(a) * f64::from(b)) as f32;
            prop_assert_eq!(alpha(&[a], &[b]).to_bits(), want.to_bits());
        }
    }
}
