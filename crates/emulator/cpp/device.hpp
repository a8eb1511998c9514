// What of CUDA C++ the kernels of cu/ use, for the host: included once, before them.
//
// Blocks run one after the other. A thread of a block runs to its end before the next one starts, unless it comes to
// __syncthreads(): there it stays behind, on the stack it has, and the next threads get another stack, until all of the
// block are there. Forwards or backwards: a result that depends on it is a race. All state is one per host thread, so
// kernels of several streams run at the same time. Compiled so that a misaligned access traps, as it would on a device.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "kernel.hpp"

#define __global__
#define __device__
// blocks of several streams run at the same time, on a host thread each
#define __shared__ static thread_local
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
static thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// A stack on which threads of blocks run, and where the one that waits on it will go on.
struct Fiber {
    char* stack = nullptr;
    ucontext_t start;
    jmp_buf resume;
    unsigned thread = 0;
    bool started = false;
    bool waits = false;
};

constexpr size_t STACK_BYTES = 64 << 10, GUARD_BYTES = 4 << 10;

// The block that runs on this host thread.
struct Block {
    const Launch* launch = nullptr;
    // threads that have started, in the order of their turns
    unsigned started = 0;
    jmp_buf scheduler;
    Fiber* running = nullptr;
    std::vector<Fiber*> all, idle, waiting, turn;

    ~Block() {
        for (Fiber* fiber : all) {
            munmap(fiber->stack, STACK_BYTES + GUARD_BYTES);
            delete fiber;
        }
    }
};
static thread_local Block block;

inline unsigned nth(unsigned i, unsigned count) { return block.launch->backwards ? count - 1 - i : i; }

// Runs threads that have not started; returns to the scheduler when none is left.
[[noreturn]] inline void fiber_main() {
    for (;;) {
        while (block.started < blockDim.x) {
            threadIdx.x = nth(block.started++, blockDim.x);
            block.launch->kernel->invoke(block.launch->params);
        }
        if (_setjmp(block.running->resume) == 0) _longjmp(block.scheduler, 1);
    }
}

inline Fiber* idle_fiber() {
    if (block.idle.empty()) {
        Fiber* fiber = new Fiber;
        constexpr int RIGHTS = PROT_READ | PROT_WRITE, KIND = MAP_PRIVATE | MAP_ANONYMOUS;
        void* memory = mmap(nullptr, STACK_BYTES + GUARD_BYTES, RIGHTS, KIND, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) {
            std::perror("stack of an emulated thread");
            std::abort();
        }
        fiber->stack = static_cast<char*>(memory);
        block.all.push_back(fiber);
        block.idle.push_back(fiber);
    }
    Fiber* fiber = block.idle.back();
    block.idle.pop_back();
    return fiber;
}

// Until its thread waits, or no thread is left to start.
__attribute__((noinline)) inline void resume(Fiber* fiber) {
    block.running = fiber;
    fiber->waits = false;
    if (_setjmp(block.scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack + GUARD_BYTES;
    fiber->start.uc_stack.ss_size = STACK_BYTES;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    setcontext(&fiber->start);
}

inline void sort_resumed(Fiber* fiber) { (fiber->waits ? block.waiting : block.idle).push_back(fiber); }

inline void run_block(Ran& ran) {
    block.started = 0;
    while (block.started < blockDim.x) {
        Fiber* fiber = idle_fiber();
        resume(fiber);
        sort_resumed(fiber);
    }
    // the threads that are not among those that wait have ended
    unsigned left = blockDim.x;
    while (!block.waiting.empty()) {
        ran.synchronised = true;
        if (block.waiting.size() != left) ran.diverged = true;
        left = block.waiting.size();
        block.turn.clear();
        block.turn.swap(block.waiting);
        for (Fiber* fiber : block.turn) {
            threadIdx.x = fiber->thread;
            resume(fiber);
            sort_resumed(fiber);
        }
    }
}

Ran run(const Launch& launch) {
    Ran ran = {false, false};
    block.launch = &launch;
    gridDim.x = launch.blocks;
    blockDim.x = launch.threads;
    for (unsigned b = 0; b < launch.blocks; ++b) {
        blockIdx.x = nth(b, launch.blocks);
        run_block(ran);
    }
    return ran;
}

void abandon_run() {
    block.waiting.clear();
    block.idle = block.all;
    for (Fiber* fiber : block.all) fiber->started = false;
}

template <class... Params> constexpr size_t count_of(void (*)(Params...)) { return sizeof...(Params); }

template <class Signature> struct Params;
template <class... All> struct Params<void (*)(All...)> {
    static constexpr unsigned char BYTES[] = {sizeof(All)...};
    static constexpr bool IS_ADDRESS[] = {std::is_pointer<All>::value...};
};

template <auto kernel, class... All, size_t... I>
inline void call(void (*)(All...), void** params, std::index_sequence<I...>) {
    kernel(*static_cast<All*>(params[I])...);
}
template <auto kernel> inline void invoke(void** params) {
    call<kernel>(kernel, params, std::make_index_sequence<count_of(kernel)>());
}

// An entry of KERNELS.
template <auto kernel> constexpr Kernel kernel_of(const char* name) {
    using All = Params<decltype(kernel)>;
    return {name, invoke<kernel>, count_of(kernel), All::BYTES, All::IS_ADDRESS};
}

} // namespace emulator

inline void __syncthreads() {
    using namespace emulator;
    Fiber* self = block.running;
    self->thread = threadIdx.x;
    self->waits = true;
    if (_setjmp(self->resume) == 0) _longjmp(block.scheduler, 1);
}
