// A kernel compiled for the host, and how a launch of it runs.
#pragma once

#include <cstddef>

namespace emulator {

struct Kernel {
    const char* name;
    // calls it with parameters as a launch passes them: the address of each
    void (*invoke)(void** params);
    size_t param_count;
    const unsigned char* param_bytes;
    const bool* param_is_address;
};

// All of cu/*.cu, in the unit that is generated around them.
extern const Kernel KERNELS[];
extern const size_t KERNEL_COUNT;

struct Launch {
    const Kernel* kernel;
    unsigned blocks, threads;
    void** params;
    // the last thread of the last block first
    bool backwards;
};

struct Ran {
    // threads waited for each other
    bool synchronised;
    // some threads of a block ended while others waited for them
    bool diverged;
};

// Runs all blocks on this thread of the host, one after the other.
Ran run(const Launch& launch);

// After a fault ended `run` on this thread: what it left is as if it had not been.
void abandon_run();

} // namespace emulator
