// Accesses that a device would refuse: caught where a kernel makes them, explained where the program does.
#pragma once

#include <functional>

namespace emulator {

struct Fault {
    int signal;
    void* address;
};

// Once, before the first stream.
void catch_faults();
// For each thread that runs kernels: a stack for the handler.
void catch_faults_of_this_thread();

// Whether `body` came to its end; else what ended it. Nothing in `body` may need its destructor then.
bool runs_to_its_end(void (*body)(void* data), void* data, Fault* fault);

} // namespace emulator
