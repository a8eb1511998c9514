// The placement kernel: one launch puts all spans of a staging slab where they belong, converting where types differ.
// Twin of what rank/scatter.rs does on the host: strided copies, and host/cast.rs.
//
// A warp takes a unit of 512 chunks of one span at a time; a chunk is one access of 16, 8, 4 or 1 bytes, or one element to
// be converted. A span of one huge run is many units, each of thousands of tiny spans is one: both fill the device. Units
// are numbered through all spans, and a warp finds the span of its unit by bisection.
//
//   unit     0 1 2 3 4 5 6 7 | 8 | 9 | 10 11 | …        warp w: units w, w + warps, w + 2·warps, …
//   span     0 (first_unit 0)  1   2   3 (first_unit 10)
//
// Chunks of a run start at multiples of their size in the *target*. So the first and the last of a run may be partial: they
// go byte by byte, and everything between them in whole accesses, whatever the run's own start is.

#include "floats.cuh"

// Source: cuda/place.rs, which makes the table and guarantees that accesses are aligned.
struct PlaceSpan {
    // address of the first byte
    u64 target;
    // from the slab's start
    u64 source_offset;
    u64 rows;
    // source bytes of a run
    u64 width;
    u64 source_stride;
    u64 target_stride;
    // the unit that begins this span
    u64 first_unit;
    // chunks of a run
    u64 row_chunks;
    // bytes of a chunk, or 0: elements, converted as `cast` says
    u32 access;
    u32 cast;
};

#define UNIT_CHUNKS 512
#define WARP 32

enum Cast : u32 {
    BF16_F16 = 0, BF16_F32 = 1, F16_BF16 = 2, F16_F32 = 3, F32_BF16 = 4, F32_F16 = 5, F64_BF16 = 6, F64_F16 = 7, F64_F32 = 8,
    I32_I64 = 9,
};

// An element of N bytes at any address.
template <int N> __device__ inline u64 load_element(const u8* from) {
    if (address(from) % N == 0) {
        if (N == 8) {
            uint2 word = load<8>(from);
            return word.x | (u64)word.y << 32;
        }
        return N == 4 ? load<4>(from) : load<2>(from);
    }
    u64 value = 0;
    for (int byte = 0; byte < N; ++byte) value |= (u64)from[byte] << (8 * byte);
    return value;
}

template <int N> __device__ inline void store_element(u8* to, u64 value) {
    if (address(to) % N == 0) {
        if (N == 8) {
            store<8>(to, make_uint2((u32)value, (u32)(value >> 32)));
        } else if (N == 4) {
            store<4>(to, (u32)value);
        } else {
            store<2>(to, (u16)value);
        }
        return;
    }
    for (int byte = 0; byte < N; ++byte) to[byte] = (u8)(value >> (8 * byte));
}

struct Bf16ToF16 {
    static const int FROM = 2, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_f16(bf16_to_f32((u16)x)); }
};
struct Bf16ToF32 {
    static const int FROM = 2, TO = 4;
    __device__ static u64 of(u64 x) { return __float_as_uint(bf16_to_f32((u16)x)); }
};
struct F16ToBf16 {
    static const int FROM = 2, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_bf16(f16_to_f32((u16)x)); }
};
struct F16ToF32 {
    static const int FROM = 2, TO = 4;
    __device__ static u64 of(u64 x) { return __float_as_uint(f16_to_f32((u16)x)); }
};
struct F32ToBf16 {
    static const int FROM = 4, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_bf16(__uint_as_float((u32)x)); }
};
struct F32ToF16 {
    static const int FROM = 4, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_f16(__uint_as_float((u32)x)); }
};
struct F64ToBf16 {
    static const int FROM = 8, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_bf16(f64_to_odd_f32(x)); }
};
struct F64ToF16 {
    static const int FROM = 8, TO = 2;
    __device__ static u64 of(u64 x) { return f32_to_f16(f64_to_odd_f32(x)); }
};
struct F64ToF32 {
    static const int FROM = 8, TO = 4;
    __device__ static u64 of(u64 x) { return f64_to_f32(x); }
};
struct I32ToI64 {
    static const int FROM = 4, TO = 8;
    __device__ static u64 of(u64 x) { return (u64)(long long)(int)(u32)x; }
};

// A chunk of N bytes whose place in the target is a multiple of N: number `chunk` of the run that goes to `to`.
template <int N> struct Bytes {
    typedef typename Access<N>::Word Held;
    __device__ static bool is_whole(u64 lead, u64 width, u64 chunk) {
        return chunk * N >= lead && chunk * N + N <= lead + width;
    }
    __device__ static Held get(const u8* from, const u8* to, u64 width, u64 chunk) {
        u64 lead = address(to) % N;
        Held none = {};
        return is_whole(lead, width, chunk) ? load<N>(from + (chunk * N - lead)) : none;
    }
    __device__ static void put(const u8* from, u8* to, u64 width, u64 chunk, Held held) {
        u64 lead = address(to) % N;
        if (is_whole(lead, width, chunk)) {
            store<N>(to + (chunk * N - lead), held);
            return;
        }
        u64 first = chunk == 0 ? 0 : chunk * N - lead;
        u64 last = chunk * N + N - lead < width ? chunk * N + N - lead : width;
        for (u64 at = first; at < last; ++at) to[at] = from[at];
    }
};

// An element; number `chunk` of its run.
template <class Conversion> struct Elements {
    typedef u64 Held;
    __device__ static Held get(const u8* from, const u8*, u64, u64 chunk) {
        return Conversion::of(load_element<Conversion::FROM>(from + chunk * Conversion::FROM));
    }
    __device__ static void put(const u8*, u8* to, u64, u64 chunk, Held held) {
        store_element<Conversion::TO>(to + chunk * Conversion::TO, held);
    }
};

// Where a lane is within a span: a run and a chunk of it, and how far it is to the lane's next chunk.
struct Walk {
    u64 row, chunk, rows_on, chunks_on, row_chunks;
    __device__ void step() {
        row += rows_on;
        chunk += chunks_on;
        if (chunk >= row_chunks) {
            chunk -= row_chunks;
            ++row;
        }
    }
};

__device__ inline Walk walk_of(u64 unit, u64 row_chunks, u32 lane) {
    u64 first = unit * UNIT_CHUNKS + lane;
    Walk walk = {first / row_chunks, first % row_chunks, WARP / row_chunks, WARP % row_chunks, row_chunks};
    return walk;
}

// One unit of a span: 16 chunks of each lane, HELD of them read before they are written; no division between them.
template <class Chunk, int HELD> __device__ inline void move_unit(const u8* source, const PlaceSpan& span, Walk walk) {
#pragma unroll 1
    for (int step = 0; step < UNIT_CHUNKS / WARP; step += HELD) {
        typename Chunk::Held held[HELD];
        // walked twice: that takes fewer registers than to remember
        Walk again = walk;
#pragma unroll
        for (int i = 0; i < HELD; ++i, walk.step()) {
            if (walk.row < span.rows) {
                const u8* to = reinterpret_cast<const u8*>(span.target + walk.row * span.target_stride);
                held[i] = Chunk::get(source + walk.row * span.source_stride, to, span.width, walk.chunk);
            }
        }
#pragma unroll
        for (int i = 0; i < HELD; ++i, again.step()) {
            if (again.row < span.rows) {
                u8* to = reinterpret_cast<u8*>(span.target + again.row * span.target_stride);
                Chunk::put(source + again.row * span.source_stride, to, span.width, again.chunk, held[i]);
            }
        }
    }
}

template <class Conversion> __device__ inline void convert_unit(const u8* source, const PlaceSpan& span, const Walk& walk) {
    move_unit<Elements<Conversion>, 1>(source, span, walk);
}

// The last of `spans` whose first unit is not beyond `unit`.
__device__ inline u32 span_of(const PlaceSpan* spans, u32 span_count, u64 unit) {
    u32 low = 0, high = span_count;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (spans[middle].first_unit <= unit) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// The accesses that a lane holds are as many as 80 registers allow without spills: three blocks on a multiprocessor, with
// 48 KiB of 16-byte accesses in flight. Source: ptxas 12.8; not measured.
//
// Places `spans`, which have `unit_count` units in all and at least one byte each. `slab` is a multiple of 16.
extern "C" __global__ void __launch_bounds__(256) place(const u8* slab, const PlaceSpan* spans, u32 span_count, u64 unit_count) {
    u32 lane = threadIdx.x % WARP;
    u64 warps = item_stride() / WARP;
    for (u64 unit = first_item() / WARP; unit < unit_count; unit += warps) {
        const PlaceSpan span = spans[span_of(spans, span_count, unit)];
        const u8* source = slab + span.source_offset;
        const Walk walk = walk_of(unit - span.first_unit, span.row_chunks, lane);
        switch (span.access) {
        case 16: move_unit<Bytes<16>, 4>(source, span, walk); continue;
        case 8: move_unit<Bytes<8>, 2>(source, span, walk); continue;
        case 4: move_unit<Bytes<4>, 2>(source, span, walk); continue;
        case 1: move_unit<Bytes<1>, 1>(source, span, walk); continue;
        }
        switch (span.cast) {
        case BF16_F16: convert_unit<Bf16ToF16>(source, span, walk); break;
        case BF16_F32: convert_unit<Bf16ToF32>(source, span, walk); break;
        case F16_BF16: convert_unit<F16ToBf16>(source, span, walk); break;
        case F16_F32: convert_unit<F16ToF32>(source, span, walk); break;
        case F32_BF16: convert_unit<F32ToBf16>(source, span, walk); break;
        case F32_F16: convert_unit<F32ToF16>(source, span, walk); break;
        case F64_BF16: convert_unit<F64ToBf16>(source, span, walk); break;
        case F64_F16: convert_unit<F64ToF16>(source, span, walk); break;
        case F64_F32: convert_unit<F64ToF32>(source, span, walk); break;
        case I32_I64: convert_unit<I32ToI64>(source, span, walk); break;
        }
    }
}
