//! Loops with wider vectors than the build's baseline, where the processor has them.

/// Runs `kernel`, which is to be inlined in full, as code for AVX-512 or AVX2 where that can be had.
///
/// Worth it for casts, which are arithmetic: F16 to BF16 makes 2.4 GB/s with the SSE2 of x86-64's baseline, 4.0 with AVX2
/// and 7.8 with AVX-512, F32 to F16 4.2, 6.4 and 14 (one thread; a copy: 15). Kernels that only move bytes gain nothing.
#[inline]
pub(super) fn widest<R>(kernel: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has the three features that `avx512` is compiled for.
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(kernel) };
        }
    }
    kernel()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512<R>(kernel: impl FnOnce() -> R) -> R {
    kernel()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<R>(kernel: impl FnOnce() -> R) -> R {
    kernel()
}
