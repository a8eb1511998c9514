// Rows in another order, and matrices cut into 128-byte blocks of columns, in place. Twin of host/rows.rs and host/blocks.rs.
//
// Both are permutations of equal runs of bytes (rows, or 128-byte pieces of rows), which follow the permutation's cycles.
// A cycle is cut into segments that run side by side; of each segment of a cut cycle, the first run is saved before anything
// moves, because the segment before it ends in it:
//
//   cycle   1 ← 4 ← 16 ← 2 ← 8 ← (1)       segment A: 1 ← 4, 4 ← 16, 16 ← saved 2
//                                          segment B: 2 ← 8, 8 ← saved 1
//
// Every run is read once and written once, and the workspace is one run per segment. Lanes run along the bytes of a run.

#include "order.cuh"

// A part of a cycle; `count` runs from `first` on. Source: cuda/permute.rs, which makes the table.
struct Segment {
    u32 first;
    u32 count;
    // the saved run that becomes the last run of the segment, or WHOLE_CYCLE: its own first
    u32 last;
};
#define WHOLE_CYCLE 0xffffffffu
// Runs that are read before they are written.
#define RUNS_HELD 8

// What is permuted: `order` of `rows` rows, each cut into `blocks` pieces that are sorted by block first (1: whole rows).
struct Permutation {
    u32 order, rows, blocks;
    __device__ u32 source(u32 run) const {
        if (blocks == 1) return source_row(order, run, rows);
        return source_row(order, run % rows, rows) * blocks + run / rows;
    }
};

template <int N> __device__ inline void save_all(
    const u8* bands, u64 band_count, u64 band_bytes, u64 run_bytes, const Segment* segments, u32 saved, u8* workspace) {
    u64 chunks = run_bytes / N, total = band_count * saved * chunks;
    for (u64 at = first_item(); at < total; at += item_stride()) {
        u64 chunk = at % chunks, place = at / chunks;
        const u8* band = bands + place / saved * band_bytes;
        const u8* run = band + segments[place % saved].first * run_bytes;
        store<N>(workspace + place * run_bytes + chunk * N, load<N>(run + chunk * N));
    }
}

template <int N> __device__ inline void move_all(
    u8* bands, u64 band_count, u64 band_bytes, u64 run_bytes, const Segment* segments, u32 segment_count, u32 saved,
    Permutation permutation, const u8* workspace) {
    typedef typename Access<N>::Word Word;
    u64 chunks = run_bytes / N, total = band_count * segment_count * chunks;
    for (u64 at = first_item(); at < total; at += item_stride()) {
        u64 chunk = at % chunks, place = at / chunks, number = place / segment_count;
        Segment segment = segments[place % segment_count];
        u8* column = bands + number * band_bytes + chunk * N;
        u32 to = segment.first;
        Word last;
        if (segment.last == WHOLE_CYCLE) {
            last = load<N>(column + to * run_bytes);
        } else {
            last = load<N>(workspace + (number * saved + segment.last) * run_bytes + chunk * N);
        }
        for (u32 left = segment.count - 1; left > 0;) {
            u32 from[RUNS_HELD];
            Word held[RUNS_HELD];
            u32 next = to;
#pragma unroll
            for (int i = 0; i < RUNS_HELD; ++i) {
                if (i < left) {
                    next = permutation.source(next);
                    from[i] = next;
                    held[i] = load<N>(column + next * run_bytes);
                }
            }
#pragma unroll
            for (int i = 0; i < RUNS_HELD; ++i) {
                if (i < left) {
                    store<N>(column + to * run_bytes, held[i]);
                    to = from[i];
                }
            }
            left = left > RUNS_HELD ? left - RUNS_HELD : 0;
        }
        store<N>(column + to * run_bytes, last);
    }
}

// Saves the first runs of the segments 0..saved, which are those of cut cycles, to `workspace`
// [band_count, saved, run_bytes].
extern "C" __global__ void __launch_bounds__(256) permute_save(
    const u8* bands, u64 band_count, u64 band_bytes, u64 run_bytes, const Segment* segments, u32 saved, u8* workspace) {
    u64 all = address(bands) | address(workspace) | band_bytes | run_bytes;
    if (all % 16 == 0) {
        save_all<16>(bands, band_count, band_bytes, run_bytes, segments, saved, workspace);
    } else if (all % 4 == 0) {
        save_all<4>(bands, band_count, band_bytes, run_bytes, segments, saved, workspace);
    } else {
        save_all<1>(bands, band_count, band_bytes, run_bytes, segments, saved, workspace);
    }
}

// Moves the runs of `bands`, `band_count` times `band_bytes`, after permute_save has run where `saved` is not zero.
extern "C" __global__ void __launch_bounds__(256) permute_move(
    u8* bands, u64 band_count, u64 band_bytes, u64 run_bytes, const Segment* segments, u32 segment_count, u32 saved,
    u32 order, u32 rows, u32 blocks, const u8* workspace) {
    Permutation permutation = {order, rows, blocks};
    u64 all = address(bands) | address(workspace) | band_bytes | run_bytes;
    if (all % 16 == 0) {
        move_all<16>(bands, band_count, band_bytes, run_bytes, segments, segment_count, saved, permutation, workspace);
    } else if (all % 4 == 0) {
        move_all<4>(bands, band_count, band_bytes, run_bytes, segments, segment_count, saved, permutation, workspace);
    } else {
        move_all<1>(bands, band_count, band_bytes, run_bytes, segments, segment_count, saved, permutation, workspace);
    }
}
