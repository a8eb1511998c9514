// Accesses that a device would refuse: caught where a kernel makes them, explained where the program does.
#pragma once

#include <vector>

namespace emulator {

struct Fault {
    int signal;
    void* address;
};

// Once, before the first stream.
void catch_faults();
// For each thread that runs kernels, as long as it does: a stack for the handler, as the stack of an emulated thread
// may be what has run out.
class FaultStack {
  public:
    FaultStack();
    ~FaultStack();
    FaultStack(const FaultStack&) = delete;
    FaultStack& operator=(const FaultStack&) = delete;

  private:
    std::vector<char> memory_;
};

// Whether `body` came to its end; else what ended it. Nothing in `body` may need its destructor then.
bool runs_to_its_end(void (*body)(void* data), void* data, Fault* fault);

} // namespace emulator
