// Runs CUDA kernels on the host, thread after thread: what the sources of cu/ mean, for a machine without a device.
//
// Threads of a kernel that synchronises are contexts of their own, which take turns at each __syncthreads(): all of a block
// get there before one goes on. Blocks run one after the other, so __shared__ memory is static. Forwards or backwards: a
// result that depends on it is a race. Compiled so that a misaligned access traps, as it would on a device.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

template <class To, class From> inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }

struct Dimension {
    unsigned x;
};
static Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class Outcome { Done = 0, UnknownKernel = 1, DivergentBarrier = 2, BarrierUnannounced = 3 };

struct Launch {
    void (*invoke)(void**);
    void** params;
    bool backwards, synchronises;
    Outcome outcome;
};
static Launch launch;
static ucontext_t scheduler;
static ucontext_t* running = nullptr;
static bool finished;

inline unsigned nth(unsigned i, unsigned count) { return launch.backwards ? count - 1 - i : i; }

inline void thread_main() {
    launch.invoke(launch.params);
    finished = true;
    swapcontext(running, &scheduler);
}

// A block whose threads wait for each other: turn after turn, each up to its next barrier.
inline void run_turns() {
    constexpr size_t STACK = 64 << 10;
    static std::vector<char> stacks;
    stacks.resize(STACK * blockDim.x);
    std::vector<ucontext_t> threads(blockDim.x);
    std::vector<bool> done(blockDim.x, false);
    for (unsigned t = 0; t < blockDim.x; ++t) {
        getcontext(&threads[t]);
        threads[t].uc_stack.ss_sp = stacks.data() + STACK * t;
        threads[t].uc_stack.ss_size = STACK;
        threads[t].uc_link = nullptr;
        makecontext(&threads[t], thread_main, 0);
    }
    for (unsigned left = blockDim.x; left > 0;) {
        unsigned ended = 0;
        for (unsigned i = 0; i < blockDim.x; ++i) {
            unsigned t = nth(i, blockDim.x);
            if (done[t]) continue;
            threadIdx.x = t;
            finished = false;
            running = &threads[t];
            swapcontext(&scheduler, running);
            if (finished) {
                done[t] = true;
                ++ended;
            }
        }
        if (ended != 0 && ended != left) launch.outcome = Outcome::DivergentBarrier;
        left -= ended;
    }
}

inline void run_grid() {
    for (unsigned b = 0; b < gridDim.x; ++b) {
        blockIdx.x = nth(b, gridDim.x);
        if (launch.synchronises) {
            run_turns();
            continue;
        }
        for (unsigned t = 0; t < blockDim.x; ++t) {
            threadIdx.x = nth(t, blockDim.x);
            launch.invoke(launch.params);
        }
    }
}

template <auto kernel, class... Params, size_t... I>
inline void call(void (*)(Params...), void** params, std::index_sequence<I...>) {
    kernel(*static_cast<Params*>(params[I])...);
}
template <class... Params> constexpr size_t count_of(void (*)(Params...)) { return sizeof...(Params); }

// Calls a kernel with parameters as a launch passes them: the address of each.
template <auto kernel> inline void invoke(void** params) {
    call<kernel>(kernel, params, std::make_index_sequence<count_of(kernel)>());
}

struct Kernel {
    const char* name;
    void (*invoke)(void**);
};

} // namespace emulator

inline void __syncthreads() {
    using namespace emulator;
    if (!launch.synchronises) {
        launch.outcome = Outcome::BarrierUnannounced;
        return;
    }
    ucontext_t* self = running;
    unsigned thread = threadIdx.x;
    swapcontext(self, &scheduler);
    threadIdx.x = thread;
}
