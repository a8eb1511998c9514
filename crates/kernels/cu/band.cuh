// Bytes reordered within bands of rows, in place: a block of threads takes a band at a time.
//
// All of a band is read before any of it is written. Where it fits, its threads hold it in registers between the two: the
// matrix crosses memory once each way. A longer band goes through the block's part of a workspace, which is small enough to
// stay in the second-level cache.
#pragma once

#include "common.cuh"

// `Move` has: Piece, what a thread holds for one item; load(band, item) and store(band, item, piece).
// `matrix` and `workspace` are 16-byte aligned, `band_bytes` a multiple of 16. `workspace` has gridDim.x parts of
// `band_bytes`; it is not touched when items <= HELD · blockDim.x.
template <int HELD, class Move>
__device__ inline void reorder_bands(const Move& move, u8* matrix, u64 bands, u64 band_bytes, u32 items, u8* workspace) {
    for (u64 number = blockIdx.x; number < bands; number += gridDim.x) {
        u8* band = matrix + number * band_bytes;
        if (items <= HELD * blockDim.x) {
            typename Move::Piece held[HELD];
#pragma unroll
            for (int k = 0; k < HELD; ++k) {
                u32 item = threadIdx.x + k * blockDim.x;
                if (item < items) held[k] = move.load(band, item);
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < HELD; ++k) {
                u32 item = threadIdx.x + k * blockDim.x;
                if (item < items) move.store(band, item, held[k]);
            }
        } else {
            u8* copy = workspace + blockIdx.x * band_bytes;
            for (u64 at = threadIdx.x * 16ull; at < band_bytes; at += blockDim.x * 16ull) {
                store<16>(copy + at, load<16>(band + at));
            }
            __syncthreads();
            for (u32 item = threadIdx.x; item < items; item += blockDim.x) move.store(band, item, move.load(copy, item));
            __syncthreads();
        }
    }
}
