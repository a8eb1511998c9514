// The scalars of NVFP4 layers and the KV-cache scales: F32, one rounding per operation. Twin of host/nvfp4.rs and
// host/kv.rs. A few hundred values: what counts is that they need not leave the device.

#include "floats.cuh"

// The largest; −∞ of nothing, NaNs are passed over, the first of equals (of zeros, say) wins.
__device__ inline float maximum(const float* values, u32 count) {
    float largest = __uint_as_float(0xff800000u);
    for (u32 i = 0; i < count; ++i) {
        if (values[i] > largest) largest = values[i];
    }
    return largest;
}

// 1/x by IEEE division; a NaN stays itself, made quiet.
__device__ inline float inverse(float x) {
    u32 bits = __float_as_uint(x);
    return is_nan_bits(bits) ? __uint_as_float(bits | 1u << 22) : 1.0f / x;
}

// alpha = max(input_scale) · max(scale_2), inverse = 1 / max(input_scale). One thread.
extern "C" __global__ void nvfp4_linear(
    const float* scale_2, u32 scale_2_count, const float* input_scale, u32 input_count, float* alpha, float* inverse_input) {
    if (first_item() != 0) return;
    float input = maximum(input_scale, input_count);
    *alpha = product(input, maximum(scale_2, scale_2_count));
    *inverse_input = inverse(input);
}

// For each slot of the rank: g1 = a1·w13_scale_2[slot, 0], g2 = a2·w2_scale_2[slot], quant = 1/a, g1_scale_c = w2_quant·g1.
// a1, a2 are maxima of w13_input [experts, 2] and w2_input [experts]: over all experts, or (per_expert) of the slot's own,
// which is `first_expert + slot` for slots below `per_group`, and `routed + slot − per_group` from there on.
// Of w13_quant and w2_quant, the first `quants` are written (1 where the maxima are global); g1_scale_c may be null.
extern "C" __global__ void nvfp4_experts(
    const float* w13_scale_2, const float* w2_scale_2, const float* w13_input, const float* w2_input, float* g1_alphas,
    float* g2_alphas, float* w13_quant, float* w2_quant, float* g1_scale_c, u32 slots, u32 experts, u32 first_expert,
    u32 per_group, u32 routed, u32 per_expert, u32 quants) {
    for (u64 slot = first_item(); slot < slots; slot += item_stride()) {
        u64 expert = slot < per_group ? first_expert + slot : routed + slot - per_group;
        float a1 = per_expert ? maximum(w13_input + 2 * expert, 2) : maximum(w13_input, 2 * experts);
        float a2 = per_expert ? w2_input[expert] : maximum(w2_input, experts);
        float g1 = product(a1, w13_scale_2[2 * slot]);
        g1_alphas[slot] = g1;
        g2_alphas[slot] = product(a2, w2_scale_2[slot]);
        if (slot < quants) {
            w13_quant[slot] = inverse(a1);
            w2_quant[slot] = inverse(a2);
        }
        if (g1_scale_c) g1_scale_c[slot] = product(inverse(a2), g1);
    }
}

// Settles a pair of KV-cache scales: both positive are kept, both negative become 1, a lone or positive k is copied to v.
// A positive v without a positive k is an error: `refused` becomes 1 and nothing else changes. One thread.
extern "C" __global__ void kv_scales(float* k, float* v, u32 v_given, u32* refused) {
    if (first_item() != 0) return;
    float v_scale = v_given ? *v : -1.0f;
    bool k_positive = *k > 0.0f, v_positive = v_scale > 0.0f;
    if (!k_positive && v_positive) {
        *refused = 1;
    } else if (!k_positive) {
        *k = 1.0f;
        *v = 1.0f;
    } else {
        *v = v_positive ? v_scale : *k;
    }
}
