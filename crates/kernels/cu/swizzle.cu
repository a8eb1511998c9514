// SWZ: one-byte block scales into 128×4 tiles. Twin of host/swizzle.rs.
//
// A thread makes the 16-byte rows `r` of four neighbouring tiles: it reads 16 columns of the rows r, r+32, r+64 and r+96
// of a block and transposes 4×4 words.
//
//   block of 128 rows   row r+32q: | w0 | w1 | w2 | w3 |     tile w, row r: | q0 | q1 | q2 | q3 |   512 bytes a tile
//
// Lanes run along r within two neighbouring groups of 16 columns: reads fill 32-byte sectors, writes are 256 bytes long.

#include "band.cuh"
#include "order.cuh"

// 16 columns of four rows, as the words of four tiles.
struct SwizzlePiece {
    uint4 tile[4];
};

// What an item is: group of 16 columns, row within a tile. Groups go in pairs; the second of the last pair may not exist.
__device__ inline u32 group_of(u32 item) { return item / 64 * 2 + item % 2; }
__device__ inline u32 row_of(u32 item) { return item / 2 % 32; }

// Columns `column`.. of row `row`, which has `cols`; zero beyond them and for a row that is not there.
template <int LOAD> __device__ inline uint4 row_words(const u8* matrix, u64 row, u64 rows, u32 cols, u32 column) {
    if (row >= rows) return make_uint4(0, 0, 0, 0);
    const u8* from = matrix + row * cols + column;
    if constexpr (LOAD == 16) {
        // columns are whole accesses here and with LOAD 4
        return load<16>(from);
    } else {
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 at = 0; at < 16; at += LOAD) {
            if (column + at >= cols) continue;
            if constexpr (LOAD == 4) {
                words[at / 4] = load<4>(from + at);
            } else {
                words[at / 4] |= (u32)from[at] << (8 * (at % 4));
            }
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
}

template <int LOAD>
__device__ inline SwizzlePiece gather(const u8* matrix, u64 rows, u32 cols, u32 order, u32 padded_rows, u32 first, u32 item) {
    u32 column = group_of(item) * 16;
    uint4 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 row = source_row(order, first + 32 * i + row_of(item), padded_rows);
        q[i] = row_words<LOAD>(matrix, row, rows, cols, column);
    }
    SwizzlePiece piece;
    piece.tile[0] = make_uint4(q[0].x, q[1].x, q[2].x, q[3].x);
    piece.tile[1] = make_uint4(q[0].y, q[1].y, q[2].y, q[3].y);
    piece.tile[2] = make_uint4(q[0].z, q[1].z, q[2].z, q[3].z);
    piece.tile[3] = make_uint4(q[0].w, q[1].w, q[2].w, q[3].w);
    return piece;
}

__device__ inline void scatter(u8* block, u32 cols, u32 item, const SwizzlePiece& piece) {
    u32 tile = group_of(item) * 4, tiles = (cols + 3) / 4;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        if (tile + w < tiles) store<16>(block + (u64)(tile + w) * 512 + row_of(item) * 16, piece.tile[w]);
    }
}

template <int LOAD>
__device__ inline void swizzle_all(const u8* source, u8* target, u64 count, u32 rows, u32 cols, u32 order) {
    u32 blocks = (rows + 127) / 128, padded_cols = (cols + 3) / 4 * 4;
    u32 groups = (cols + 15) / 16, items = (groups + 1) / 2 * 64;
    u64 total = count * blocks * items;
    for (u64 at = first_item(); at < total; at += item_stride()) {
        u32 item = at % items;
        u64 block = at / items, matrix = block / blocks;
        if (group_of(item) >= groups) continue;
        const u8* from = source + matrix * rows * cols;
        u32 first = (u32)(block % blocks) * 128;
        scatter(target + block * 128 * padded_cols, cols, item, gather<LOAD>(from, rows, cols, order, blocks * 128, first, item));
    }
}

// `source` [count, rows, cols] → `target` [count, ceil128(rows), ceil4(cols)], all of which is written. `order` is that of
// the padded rows. `target` is 16-byte aligned and apart from `source`.
extern "C" __global__ void __launch_bounds__(256)
swizzle(const u8* source, u8* target, u64 count, u32 rows, u32 cols, u32 order) {
    if (((address(source) | cols) & 15) == 0) {
        swizzle_all<16>(source, target, count, rows, cols, order);
    } else if (((address(source) | cols) & 3) == 0) {
        swizzle_all<4>(source, target, count, rows, cols, order);
    } else {
        swizzle_all<1>(source, target, count, rows, cols, order);
    }
}

template <int LOAD> struct SwizzleBand {
    typedef SwizzlePiece Piece;
    u32 cols, order, groups;
    __device__ Piece load(const u8* band, u32 item) const {
        Piece none = {};
        return group_of(item) < groups ? gather<LOAD>(band, 128, cols, order, 128, 0, item) : none;
    }
    __device__ void store(u8* band, u32 item, const Piece& piece) const { scatter(band, cols, item, piece); }
};

template <int LOAD>
__device__ inline void swizzle_bands(u8* matrix, u64 blocks, u32 cols, u32 order, u8* workspace) {
    u32 groups = (cols + 15) / 16;
    SwizzleBand<LOAD> move = {cols, order, groups};
    reorder_bands<4>(move, matrix, blocks, 128ull * cols, (groups + 1) / 2 * 64, workspace);
}

// `blocks` blocks [128, cols] in place, `cols` a multiple of 4; `order` moves rows within a block (as stored or SHUF32).
// `matrix` and `workspace` are 16-byte aligned. `workspace` is as reorder_bands says, used when cols exceed 1024 for 512
// threads.
extern "C" __global__ void __launch_bounds__(512)
swizzle_in_place(u8* matrix, u64 blocks, u32 cols, u32 order, u8* workspace) {
    if (cols % 16 == 0) {
        swizzle_bands<16>(matrix, blocks, cols, order, workspace);
    } else {
        swizzle_bands<4>(matrix, blocks, cols, order, workspace);
    }
}
