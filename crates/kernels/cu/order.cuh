// Orders of rows: which source row becomes row i of the result? Twin of host/permute.rs.
#pragma once

#include "common.cuh"

enum Order : u32 { AS_STORED = 0, SHUFFLED32 = 1, GATED_SHUFFLED32 = 2, INTERLEAVED64 = 3 };

__device__ inline u32 shuffled32(u32 i) { return (i & ~31u) | (i % 8 * 4 + i % 32 / 8); }

__device__ inline u32 source_row(u32 order, u32 i, u32 rows) {
    switch (order) {
    case SHUFFLED32:
        return shuffled32(i);
    case GATED_SHUFFLED32: {
        u32 j = shuffled32(i);
        return j % 2 * (rows / 2) + j / 2;
    }
    case INTERLEAVED64:
        return i % 128 / 64 * (rows / 2) + i / 128 * 64 + i % 64;
    default:
        return i;
    }
}
