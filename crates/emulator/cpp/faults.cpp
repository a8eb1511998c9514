#include "faults.hpp"

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>

#include "state.hpp"

namespace emulator {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
static struct sigaction before[65];
// where the operation that this thread runs goes on after a fault
static thread_local sigjmp_buf* armed = nullptr;
static thread_local Fault caught;

static void handle(int signal, siginfo_t* info, void* context) {
    if (armed) {
        caught = {signal, info->si_addr};
        siglongjmp(*armed, 1);
    }
    uint64_t address = reinterpret_cast<uint64_t>(info->si_addr);
    if (signal == SIGSEGV && state().memory.is_device_address(address)) {
        report("device memory at %p is accessed by a thread of the program", info->si_addr);
    }
    const struct sigaction& other = before[signal];
    if (other.sa_flags & SA_SIGINFO) {
        other.sa_sigaction(signal, info, context);
    } else if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) {
        other.sa_handler(signal);
    } else {
        // the access is repeated, and ends the process as it would without a handler
        sigaction(signal, &other, nullptr);
    }
}

void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int signal : SIGNALS) sigaction(signal, &action, &before[signal]);
}

FaultStack::FaultStack() : memory_(64 << 10) {
    stack_t stack = {};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, nullptr);
}

FaultStack::~FaultStack() {
    stack_t none = {};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
}

bool runs_to_its_end(void (*body)(void* data), void* data, Fault* fault) {
    sigjmp_buf here;
    if (sigsetjmp(here, 1) != 0) {
        armed = nullptr;
        *fault = caught;
        return false;
    }
    armed = &here;
    body(data);
    armed = nullptr;
    return true;
}

} // namespace emulator
