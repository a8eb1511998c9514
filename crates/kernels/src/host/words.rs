//! Two shuffles of a few words: what the swizzle and the E8M0 scale shuffle are made of.
//!
//! Whatever loops they are written as, the compiler keeps both in scalar registers. On x86-64, whose baseline includes
//! SSE2, they are therefore spelt out in vector operations; elsewhere, and as their definition in tests, in integers. One
//! thread: swizzle of a `[4096, 448]` matrix 10 → 13 GB/s, of a `[7168, 128]` one, which stays in the second-level cache,
//! 15 → 23; E8M0 shuffle of `[4096, 224]` 6 → 14. AVX2 adds nothing.

#[cfg(not(target_arch = "x86_64"))]
pub(super) use portable::{transposed, woven};

/// Word `i` of row `k` of the result is word `k` of row `i`; words are 4 bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn transposed(rows: [[u8; 16]; 4]) -> [[u8; 16]; 4] {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { sse2::transposed(rows) }
}

/// Four words, the n-th of which is `[a[n], b[n], a[4 + n], b[4 + n]]`.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn woven(a: [u8; 8], b: [u8; 8]) -> [u8; 16] {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { sse2::woven(a, b) }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable {
    pub(in super::super) fn transposed(rows: [[u8; 16]; 4]) -> [[u8; 16]; 4] {
        const WORD: u128 = 0xffff_ffff;
        let rows = rows.map(u128::from_le_bytes);
        [0, 32, 64, 96].map(|k| {
            let [a, b, c, d] = rows.map(|row| (row >> k) & WORD);
            (a | b << 32 | c << 64 | d << 96).to_le_bytes()
        })
    }

    pub(in super::super) fn woven(a: [u8; 8], b: [u8; 8]) -> [u8; 16] {
        const EVEN: u64 = 0x00ff_00ff_00ff_00ff;
        let (a, b) = (u64::from_le_bytes(a), u64::from_le_bytes(b));
        // 16-bit pairs a0 b0, a2 b2, a4 b4, a6 b6, and the same of the odd bytes
        let even = (a & EVEN) | (b & EVEN) << 8;
        let odd = ((a >> 8) & EVEN) | (b & (EVEN << 8));
        // pair k beside pair k + 2, the n-th beside the (n + 4)-th
        let word = |pairs: u64, k: u32| {
            u128::from(((pairs >> (16 * k)) & 0xffff) | ((pairs >> (32 + 16 * k)) & 0xffff) << 16)
        };
        let words = [word(even, 0), word(odd, 0), word(even, 1), word(odd, 1)];
        (words[0] | words[1] << 32 | words[2] << 64 | words[3] << 96).to_le_bytes()
    }
}

#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::{
        __m128i, _mm_cvtsi64_si128, _mm_cvtsi128_si64, _mm_set_epi64x, _mm_unpackhi_epi32,
        _mm_unpackhi_epi64, _mm_unpacklo_epi8, _mm_unpacklo_epi16, _mm_unpacklo_epi32,
        _mm_unpacklo_epi64,
    };

    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn transposed([a, b, c, d]: [[u8; 16]; 4]) -> [[u8; 16]; 4] {
        let (a, b, c, d) = (vector(a), vector(b), vector(c), vector(d));
        let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
        [
            bytes(_mm_unpacklo_epi64(ab, cd)),
            bytes(_mm_unpackhi_epi64(ab, cd)),
            bytes(_mm_unpacklo_epi64(ab_high, cd_high)),
            bytes(_mm_unpackhi_epi64(ab_high, cd_high)),
        ]
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    pub(super) fn woven(a: [u8; 8], b: [u8; 8]) -> [u8; 16] {
        let (a, b) = (i64::from_le_bytes(a), i64::from_le_bytes(b));
        // 16-bit pairs a0 b0, a1 b1, …, a7 b7; then each of the first four beside one of the last four
        let pairs = _mm_unpacklo_epi8(_mm_cvtsi64_si128(a), _mm_cvtsi64_si128(b));
        bytes(_mm_unpacklo_epi16(pairs, _mm_unpackhi_epi64(pairs, pairs)))
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn vector(bytes: [u8; 16]) -> __m128i {
        let both = u128::from_le_bytes(bytes);
        _mm_set_epi64x((both >> 64) as i64, both as i64)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn bytes(vector: __m128i) -> [u8; 16] {
        let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(vector, vector)) as u64;
        let low = _mm_cvtsi128_si64(vector) as u64;
        (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_transposed() {
        let rows: [[u8; 16]; 4] =
            std::array::from_fn(|i| std::array::from_fn(|byte| (16 * i + byte) as u8));
        let columns = transposed(rows);
        assert_eq!(columns, portable::transposed(rows));
        for (i, row) in rows.iter().enumerate() {
            for (k, column) in columns.iter().enumerate() {
                assert_eq!(column[4 * i..][..4], row[4 * k..][..4]);
            }
        }
    }

    #[test]
    fn bytes_are_woven() {
        let (a, b) = ([0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17]);
        let want = [0, 10, 4, 14, 1, 11, 5, 15, 2, 12, 6, 16, 3, 13, 7, 17];
        assert_eq!(woven(a, b), want);
        assert_eq!(portable::woven(a, b), want);
    }
}
