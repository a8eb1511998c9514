// Threads of the library's own.
#pragma once

#include <csignal>
#include <pthread.h>
#include <thread>

namespace emulated_nccl {

// A thread that gets no signals of the program's; those that a fault raises stay deliverable.
template <class Function> std::thread start_thread(Function function) {
    sigset_t all, before;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread thread(function);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return thread;
}

} // namespace emulated_nccl
