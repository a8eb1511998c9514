// What all kernels share: integer types, accesses of a stated width, the grid-stride loop.
//
// No header is included, so that a compiler without any (NVRTC) suffices. Every kernel takes its sizes and strides as
// parameters, works with any grid, and reads nothing from the block's shape but its size.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Threads of a block are numbered along x; blocks too.
__device__ inline u64 first_item() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline u64 item_stride() { return (u64)gridDim.x * blockDim.x; }

// The register that an access of N bytes goes through. An access of N bytes needs an address that is a multiple of N.
template <int N> struct Access;
template <> struct Access<16> { typedef uint4 Word; };
template <> struct Access<8> { typedef uint2 Word; };
template <> struct Access<4> { typedef u32 Word; };
template <> struct Access<2> { typedef u16 Word; };
template <> struct Access<1> { typedef u8 Word; };

template <int N> __device__ inline typename Access<N>::Word load(const u8* from) {
    return *reinterpret_cast<const typename Access<N>::Word*>(from);
}

template <int N> __device__ inline void store(u8* to, typename Access<N>::Word word) {
    *reinterpret_cast<typename Access<N>::Word*>(to) = word;
}

__device__ inline u64 address(const void* pointer) { return reinterpret_cast<u64>(pointer); }
