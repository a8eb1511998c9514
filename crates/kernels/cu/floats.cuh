// Small floats and conversions, in integers as the host has them: a device's own conversions make other NaNs. Twin of
// host/float.rs. Compiled without fused multiply-add and with subnormals.
#pragma once

#include "common.cuh"

__device__ inline bool is_nan_bits(u32 bits) { return (bits & 0x7fffffff) > 0x7f800000; }

// E4M3 as an F32. Source: OCP 8-bit floating point specification, table 1.
__device__ inline float e4m3_to_f32(u8 code) {
    u32 exponent = code >> 3 & 0xf, mantissa = code & 7, sign = (u32)(code & 0x80) << 24;
    u32 bits;
    if ((code & 0x7f) == 0x7f) {
        bits = 0x7fc00000;
    } else if (exponent == 0) {
        bits = __float_as_uint((float)mantissa / 512.0f);
    } else {
        bits = (exponent + 120) << 23 | mantissa << 20;
    }
    return __uint_as_float(bits | sign);
}

// E2M1 as an F32: codes 0 to 7, bit 3 is the sign.
__device__ inline float e2m1_to_f32(u32 code) {
    u32 magnitude = code & 7;
    // 0, 0.5, then 1.m · 2^(e − 1)
    u32 bits = magnitude == 0 ? 0 : magnitude == 1 ? 0x3f000000 : ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22;
    return __uint_as_float(bits | (code & 8) << 28);
}

// E8M0: 2^(code − 127); 255 is NaN. Source: OCP microscaling formats specification, §5.4.1.
__device__ inline float e8m0_to_f32(u8 code) {
    return __uint_as_float(code == 0 ? 1u << 22 : code == 255 ? 0x7fc00000u : (u32)code << 23);
}

// a · b, rounded once. Which NaN: that of a, else of b, made quiet; the positive one without payload where neither is.
__device__ inline float product(float a, float b) {
    u32 left = __float_as_uint(a), right = __float_as_uint(b), bits = __float_as_uint(a * b);
    if (is_nan_bits(left)) return __uint_as_float(left | 1u << 22);
    if (is_nan_bits(right)) return __uint_as_float(right | 1u << 22);
    return __uint_as_float(is_nan_bits(bits) ? 0x7fc00000u : bits);
}

__device__ inline float bf16_to_f32(u16 half) {
    u32 quiet = (half & 0x7fff) > 0x7f80 ? 0x40 : 0;
    return __uint_as_float((half | quiet) << 16);
}

__device__ inline u16 f32_to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    u32 nearest = bits + 0x7fff + (bits >> 16 & 1);
    return (is_nan_bits(bits) ? bits | 0x40u << 16 : nearest) >> 16;
}

__device__ inline float f16_to_f32(u16 half) {
    u32 sign = (u32)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    u32 normal = (magnitude << 13) + (112u << 23);
    u32 subnormal = __float_as_uint(__uint_as_float(magnitude << 13 | 113u << 23) - __uint_as_float(113u << 23));
    u32 quiet = magnitude > 0x7c00 ? 1u << 22 : 0;
    u32 infinite_or_nan = magnitude << 13 | 255u << 23 | quiet;
    u32 finite = magnitude < 0x400 ? subnormal : normal;
    return __uint_as_float((magnitude < 0x7c00 ? finite : infinite_or_nan) | sign);
}

__device__ inline u16 f32_to_f16(float x) {
    u32 all = __float_as_uint(x), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    u32 normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    // next to 0.5 an F32 is a multiple of 2^−24, which is F16's smallest step: the addition rounds
    u32 subnormal = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
    u32 nan = 0x7e00 | (bits >> 13 & 0x3ff);
    u32 small = bits < 113u << 23 ? subnormal : normal;
    u32 large = bits > 255u << 23 ? nan : 0x7c00;
    return sign | (bits < 143u << 23 ? small : large);
}

__device__ inline bool is_nan_bits64(u64 bits) { return (bits & 0x7fffffffffffffffull) > 0x7ff0000000000000ull; }

// Nearest, ties to even; a NaN keeps its sign and leading payload bits and becomes quiet.
__device__ inline u32 f64_to_f32(u64 bits) {
    if (is_nan_bits64(bits)) return (u32)(bits >> 32 & 0x80000000u) | 0x7fc00000u | (u32)(bits >> 29 & 0x3fffff);
    return __float_as_uint((float)__longlong_as_double((long long)bits));
}

// Rounded to odd, as host/float.rs::f64_to_odd_f32 says and why.
__device__ inline float f64_to_odd_f32(u64 bits) {
    double x = __longlong_as_double((long long)bits);
    u32 nearest = f64_to_f32(bits);
    double back = (double)__uint_as_float(nearest);
    if (is_nan_bits64(bits) || back == x) return __uint_as_float(nearest);
    bool beyond = fabs(back) > fabs(x);
    return __uint_as_float((nearest - (beyond ? 1 : 0)) | 1);
}
