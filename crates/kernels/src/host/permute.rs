//! Orders of rows. Each function answers: which source row becomes row `i` of the result? Source: reference §4.0.

/// SHUF32 ("A", epilogue tile 128): row `32t + 8a + b` comes from row `32t + 4b + a`.
pub fn shuffled32(i: usize) -> usize {
    let (t, q) = (i / 32, i % 32);
    32 * t + 4 * (q % 8) + q / 8
}

/// W31PERM: the two halves of `rows` interleaved (even rows from the first half), then [`shuffled32`].
pub fn gated_shuffled32(i: usize, rows: usize) -> usize {
    let j = shuffled32(i);
    if j % 2 == 0 { j / 2 } else { rows / 2 + j / 2 }
}

/// IL64: the two halves of `rows` interleaved in chunks of 64 rows.
pub fn interleaved64(i: usize, rows: usize) -> usize {
    let (t, q) = (i / 128, i % 128);
    q / 64 * (rows / 2) + 64 * t + q % 64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The golden vectors of §4.0.
    #[test]
    fn orders_begin_as_the_reference_says() {
        let first: Vec<usize> = (0..32).map(shuffled32).collect();
        let want: Vec<usize> = (0..4).flat_map(|a| (0..8).map(move |b| 4 * b + a)).collect();
        assert_eq!(first, want);
        assert_eq!(first[..10], [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]);
        let gated: Vec<usize> = (0..32).map(|i| gated_shuffled32(i, 128)).collect();
        let want = [
            [0, 2, 4, 6, 8, 10, 12, 14],
            [64, 66, 68, 70, 72, 74, 76, 78],
            [1, 3, 5, 7, 9, 11, 13, 15],
            [65, 67, 69, 71, 73, 75, 77, 79],
        ];
        assert_eq!(gated, want.as_flattened());
    }

    /// W31PERM is GATED, then SHUF32; IL64 as §4.0 writes it.
    #[test]
    fn orders_are_what_they_are_made_of() {
        let rows = 384;
        let gated = |i: usize| i % 2 * (rows / 2) + i / 2;
        for i in 0..rows {
            assert_eq!(gated_shuffled32(i, rows), gated(shuffled32(i)));
        }
        for (t, h, b) in
            (0..3).flat_map(|t| (0..2).flat_map(move |h| (0..64).map(move |b| (t, h, b))))
        {
            assert_eq!(interleaved64(128 * t + 64 * h + b, rows), h * rows / 2 + 64 * t + b);
        }
    }

    #[test]
    fn orders_are_permutations() {
        for rows in [128, 256, 384] {
            let mut a: Vec<usize> = (0..rows).map(shuffled32).collect();
            let mut b: Vec<usize> = (0..rows).map(|i| gated_shuffled32(i, rows)).collect();
            let mut c: Vec<usize> = (0..rows).map(|i| interleaved64(i, rows)).collect();
            let all: Vec<usize> = (0..rows).collect();
            for order in [&mut a, &mut b, &mut c] {
                order.sort_unstable();
                assert_eq!(*order, all);
            }
        }
    }
}
