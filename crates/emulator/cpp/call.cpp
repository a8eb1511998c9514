#include "call.hpp"

#include <cstdarg>
#include <cstdio>
#include <pthread.h>
#include <thread>

namespace emulator {

State& state() {
    static State* const made = new State;
    return *made;
}

std::vector<CUcontext>& context_stack() {
    static thread_local std::vector<CUcontext> stack;
    return stack;
}

CUcontext current_context() { return context_stack().empty() ? nullptr : context_stack().back(); }

CUcontext handle_of(const Context& context) {
    uint64_t handle = 0x5e00'0000'0000'0000 | uint64_t(context.generation) << 16 | (context.device + 1) << 4;
    return reinterpret_cast<CUcontext>(handle);
}

Context* context_of(CUcontext handle, bool* destroyed) {
    for (const auto& context : state().contexts) {
        uint64_t now = reinterpret_cast<uint64_t>(handle_of(*context)), given = reinterpret_cast<uint64_t>(handle);
        if (now == given && context->retained > 0) return context.get();
        bool was = (now & ~uint64_t(0xffff0000)) == (given & ~uint64_t(0xffff0000));
        if (was && destroyed) *destroyed = true;
    }
    return nullptr;
}

// The program's own threads may be late too.
static void delay_caller() {
    static std::atomic<uint64_t> threads{0};
    static thread_local Random random(settings().seed * 31 + ++threads);
    if (random.below(4) == 0) delay(random);
}

Call::Call(const char* name, const char* kind, Needs needs) : Call(name, kind, needs, false) {}

Call Call::queueing(const char* name, const char* kind) { return Call(name, kind, Needs::Context, true); }

Call::Call(const char* name, const char* kind, Needs needs, bool queues) : name_(name) {
    State& all = state();
    if (in_host_function()) {
        refused = wrong(CUDA_ERROR_NOT_PERMITTED, "called by a host function");
        return;
    }
    // before the lock, which a thread that is not in the fork may hold
    if (all.forked) {
        refused = wrong(CUDA_ERROR_NOT_INITIALIZED, "called by a fork of the process that called cuInit");
        return;
    }
    delay_caller();
    lock = Lock(all.mutex);
    if (!all.initialised) {
        refused = wrong(CUDA_ERROR_NOT_INITIALIZED, "called before cuInit");
        return;
    }
    if (needs != Needs::Init) {
        bool destroyed = false;
        context = context_of(current_context(), &destroyed);
        if (!context) {
            refused = destroyed ? wrong(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the current context is destroyed")
                                : wrong(CUDA_ERROR_INVALID_CONTEXT, "no context is current");
            return;
        }
        if (needs == Needs::Context && context->lost) {
            refused = context->lost;
            return;
        }
    }
    CUresult error = emulator::injected(kind, name, context ? context->device : -1);
    if (queues && is_sticky(error)) {
        injected = error;
        return;
    }
    refused = error;
    if (context && is_sticky(error)) lose(lock, *context, error);
}

CUresult Call::wrong(CUresult error, const char* format, ...) const {
    char why[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    report("%s: %s: %s", name_, error_name(error), why);
    return error;
}

std::shared_ptr<Stream> Call::stream(CUstream handle) {
    uint64_t number = reinterpret_cast<uint64_t>(handle);
    if (number <= 1) return null_stream(*context);
    if (number == 2) {
        refused = wrong(CUDA_ERROR_NOT_SUPPORTED, "per-thread default streams are not emulated");
        return nullptr;
    }
    std::shared_ptr<Stream> found = state().streams.find(handle);
    if (!found) refused = wrong(CUDA_ERROR_INVALID_HANDLE, "no stream is %p", static_cast<void*>(handle));
    return found;
}

void destroy(Lock& lock, Context& context) {
    State& all = state();
    context.ending = true;
    wait_for(lock, context, work_of(context));
    auto here = [&](const auto& thing) { return thing.context == &context; };
    all.streams.remove_if(here);
    all.events.remove_if(here);
    all.modules.remove_if(here);
    all.functions.remove_if(here);
    for (const auto& stream : context.streams) close_stream(*stream);
    context.null_stream = nullptr;
    all.memory.free_all(context);
    ++context.generation;
    context.retained = 0;
    context.visible = 0;
    context.ending = false;
    all.progress.notify_all();
}

} // namespace emulator
