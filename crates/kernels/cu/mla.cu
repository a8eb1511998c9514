// The MLA split: kv_b_proj [heads·(dn+dv), kl] by head into w_kc [heads, kl, dn] and w_vc [heads, dv, kl], both BF16.
// Twin of host/mla.rs.
//
// A block of 256 threads takes 32×32 elements at a time. Keys come out transposed, by way of shared memory, so that reads
// and writes alike are 64 bytes long; values keep their rows.

#include "floats.cuh"

#define TILE 32

struct Bf16Weight {
    const u16* data;
    __device__ u16 at(u64 row, u64 column, u64 cols) const { return data[row * cols + column]; }
};
struct F16Weight {
    const u16* data;
    __device__ u16 at(u64 row, u64 column, u64 cols) const { return f32_to_bf16(f16_to_f32(data[row * cols + column])); }
};
struct F32Weight {
    const u32* data;
    __device__ u16 at(u64 row, u64 column, u64 cols) const { return f32_to_bf16(__uint_as_float(data[row * cols + column])); }
};
// One F32 factor per 128×128 block; the last ones are partial.
struct Fp8Weight {
    const u8* data;
    const u32* scale;
    __device__ u16 at(u64 row, u64 column, u64 cols) const {
        float factor = __uint_as_float(scale[row / 128 * ((cols + 127) / 128) + column / 128]);
        return f32_to_bf16(product(e4m3_to_f32(data[row * cols + column]), factor));
    }
};
// Pairs of E2M1, low nibble first; one E8M0 factor per 32 columns.
struct Mxfp4Weight {
    const u8* data;
    const u8* scale;
    __device__ u16 at(u64 row, u64 column, u64 cols) const {
        u64 element = row * cols + column;
        u32 code = data[element / 2] >> (element % 2 * 4) & 15;
        return f32_to_bf16(product(e2m1_to_f32(code), e8m0_to_f32(scale[element / 32])));
    }
};

template <class Weight>
__device__ inline void split(const Weight& weight, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    // a column more, so that a column is in 32 banks (of two elements each) rather than in one
    __shared__ u16 tile[TILE][TILE + 2];
    u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE, lines = blockDim.x / TILE;
    u64 across = (kl + TILE - 1) / TILE, key_tiles = (dn + TILE - 1) / TILE, tiles = key_tiles + (dv + TILE - 1) / TILE;
    u64 total = heads * tiles * across;
    for (u64 at = blockIdx.x; at < total; at += gridDim.x) {
        u64 head = at / (tiles * across), down = at / across % tiles, column = at % across * TILE;
        u64 first = head * ((u64)dn + dv);
        if (down >= key_tiles) {
            u64 row = (down - key_tiles) * TILE;
            for (u32 i = y; i < TILE; i += lines) {
                if (row + i < dv && column + x < kl) {
                    w_vc[(head * dv + row + i) * kl + column + x] = weight.at(first + dn + row + i, column + x, kl);
                }
            }
            continue;
        }
        u64 row = down * TILE;
        for (u32 i = y; i < TILE; i += lines) {
            if (row + i < dn && column + x < kl) tile[i][x] = weight.at(first + row + i, column + x, kl);
        }
        __syncthreads();
        for (u32 i = y; i < TILE; i += lines) {
            if (column + i < kl && row + x < dn) w_kc[(head * kl + column + i) * dn + row + x] = tile[x][i];
        }
        __syncthreads();
    }
}

// Elements are aligned to their size; blocks are a multiple of 32 threads.
extern "C" __global__ void __launch_bounds__(256)
mla_split_bf16(const u16* data, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    Bf16Weight weight = {data};
    split(weight, w_kc, w_vc, heads, dn, dv, kl);
}

extern "C" __global__ void __launch_bounds__(256)
mla_split_f16(const u16* data, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    F16Weight weight = {data};
    split(weight, w_kc, w_vc, heads, dn, dv, kl);
}

extern "C" __global__ void __launch_bounds__(256)
mla_split_f32(const u32* data, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    F32Weight weight = {data};
    split(weight, w_kc, w_vc, heads, dn, dv, kl);
}

extern "C" __global__ void __launch_bounds__(256)
mla_split_fp8(const u8* data, const u32* scale, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    Fp8Weight weight = {data, scale};
    split(weight, w_kc, w_vc, heads, dn, dv, kl);
}

extern "C" __global__ void __launch_bounds__(256)
mla_split_mxfp4(const u8* data, const u8* scale, u16* w_kc, u16* w_vc, u32 heads, u32 dn, u32 dv, u32 kl) {
    Mxfp4Weight weight = {data, scale};
    split(weight, w_kc, w_vc, heads, dn, dv, kl);
}
