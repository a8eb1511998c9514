// What every call of the driver begins with.
#pragma once

#include "state.hpp"

namespace emulator {

enum class Needs {
    // cuInit
    Init,
    // a current context that is not lost
    Context,
    // a current context, lost or not
    AnyContext,
};

// Holds the lock while it lives. `kind` is what the call counts as when it is to fail on demand.
class Call {
  public:
    Call(const char* name, const char* kind, Needs needs);
    // A call that queues an operation: a failure that loses the context comes later, with the operation.
    static Call queueing(const char* name, const char* kind);

    // not success: the call's answer
    CUresult refused = CUDA_SUCCESS;
    // queueing: how the operation is to end
    CUresult injected = CUDA_SUCCESS;
    // the current one, where one is needed
    Context* context = nullptr;
    Lock lock;

    // The answer, said on stderr: the program is wrong, rather than the machine.
    __attribute__((format(printf, 3, 4))) CUresult wrong(CUresult error, const char* format, ...) const;

    // The stream that a handle names, or null: then `refused` says why.
    std::shared_ptr<Stream> stream(CUstream handle);

  private:
    Call(const char* name, const char* kind, Needs needs, bool queues);
    const char* name_;
};

// Of this thread: the current context, or null.
CUcontext current_context();
std::vector<CUcontext>& context_stack();

} // namespace emulator
