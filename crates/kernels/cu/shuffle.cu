// AITER's shuffles, in place: E8M0 scales by bands of 32 rows, packed weights by bands of 16. Twin of host/shuffle.rs.

#include "band.cuh"

// A thread makes 4 × 16 bytes of a tile of 256: for each n of 4, bytes 16g..16g+16 of the 64 that n%4 has, from the eight
// columns of the rows 4g..4g+4 and 4g+16..4g+20.
struct ScalePiece {
    uint4 words[4];
};

struct ScaleBand {
    typedef ScalePiece Piece;
    u32 cols;
    // byte n of a word of the result: [a[n], b[n], a[4 + n], b[4 + n]]
    __device__ static u32 woven(uint2 a, uint2 b, int n) {
        int at = 8 * n;
        return (a.x >> at & 0xff) | (b.x >> at & 0xff) << 8 | (a.y >> at & 0xff) << 16 | (b.y >> at & 0xff) << 24;
    }
    __device__ Piece load(const u8* band, u32 item) const {
        u32 group = item % 4, tile = item / 4;
        uint2 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] = ::load<8>(band + (u64)(4 * group + i) * cols + tile * 8);
            b[i] = ::load<8>(band + (u64)(4 * group + i + 16) * cols + tile * 8);
        }
        Piece piece;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            piece.words[n] = make_uint4(woven(a[0], b[0], n), woven(a[1], b[1], n), woven(a[2], b[2], n), woven(a[3], b[3], n));
        }
        return piece;
    }
    __device__ void store(u8* band, u32 item, const Piece& piece) const {
        u8* to = band + (u64)(item / 4) * 256 + item % 4 * 16;
#pragma unroll
        for (int n = 0; n < 4; ++n) ::store<16>(to + 64 * n, piece.words[n]);
    }
};

// `bands` bands [32, cols], `cols` a multiple of 8. `matrix` and `workspace` are 16-byte aligned; the workspace is
// as reorder_bands says, used when cols exceed 1024 for 128 threads.
extern "C" __global__ void __launch_bounds__(128) shuffle_scales(u8* matrix, u64 bands, u32 cols, u8* workspace) {
    ScaleBand move = {cols};
    reorder_bands<4>(move, matrix, bands, 32ull * cols, cols / 2, workspace);
}

// Unit u (16 bytes) of row n goes to unit 16u + n. Lanes take pairs of units of 16 rows, so that reads fill sectors.
struct WeightBand {
    typedef uint4 Piece;
    u64 row_bytes;
    __device__ static u32 unit(u32 item) { return item / 32 * 2 + item % 2; }
    __device__ static u32 row(u32 item) { return item / 2 % 16; }
    __device__ Piece load(const u8* band, u32 item) const {
        return ::load<16>(band + row(item) * row_bytes + (u64)unit(item) * 16);
    }
    __device__ void store(u8* band, u32 item, const Piece& piece) const {
        ::store<16>(band + ((u64)unit(item) * 16 + row(item)) * 16, piece);
    }
};

// `bands` bands [16, row_bytes], `row_bytes` a multiple of 32. `matrix` and `workspace` are 16-byte aligned; the
// workspace is as reorder_bands says, used when rows exceed 4096 bytes for 512 threads.
extern "C" __global__ void __launch_bounds__(512) shuffle_weights(u8* matrix, u64 bands, u32 row_bytes, u8* workspace) {
    WeightBand move = {row_bytes};
    reorder_bands<8>(move, matrix, bands, 16ull * row_bytes, row_bytes, workspace);
}
