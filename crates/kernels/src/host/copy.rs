//! Strided copies.

/// Copies `rows` runs of `width` bytes from `source` (`source_stride` apart) to `target` (`target_stride` apart).
///
/// # Panics
/// When a run would leave its slice.
pub fn copy_rows(
    source: &[u8],
    source_stride: usize,
    target: &mut [u8],
    target_stride: usize,
    rows: usize,
    width: usize,
) {
    for row in 0..rows {
        let (from, to) = (row * source_stride, row * target_stride);
        target[to..to + width].copy_from_slice(&source[from..from + width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_land_at_their_stride_and_nothing_else_is_touched() {
        let source: Vec<u8> = (0..12).collect();
        let mut target = vec![99; 10];
        copy_rows(&source[1..], 4, &mut target, 5, 2, 3);
        assert_eq!(target, [1, 2, 3, 99, 99, 5, 6, 7, 99, 99]);
    }
}
