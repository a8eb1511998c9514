//! A pair of KV-cache scales, settled. Source: reference §2.5; contract §4.

/// What a pair becomes: both positive are kept, both negative (or none) become 1, a lone or positive `k` is copied to `v`.
///
/// `v` is `None` where the checkpoint has no `v_scale`. The result is `None` for a positive `v` without a positive `k`.
pub fn settled(k: f32, v: Option<f32>) -> Option<(f32, f32)> {
    let v = v.unwrap_or(-1.0);
    match (k > 0.0, v > 0.0) {
        (true, true) => Some((k, v)),
        (true, false) => Some((k, k)),
        (false, false) => Some((1.0, 1.0)),
        (false, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_settled_as_the_contract_says() {
        assert_eq!(settled(0.5, Some(0.25)), Some((0.5, 0.25)));
        assert_eq!(settled(0.5, None), Some((0.5, 0.5)));
        assert_eq!(settled(0.5, Some(-1.0)), Some((0.5, 0.5)));
        assert_eq!(settled(-1.0, Some(-1.0)), Some((1.0, 1.0)));
        assert_eq!(settled(f32::NAN, None), Some((1.0, 1.0)));
        assert_eq!(settled(0.0, Some(2.0)), None);
    }
}
