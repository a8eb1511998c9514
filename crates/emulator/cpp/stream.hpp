// Streams: a host thread each, which runs what is queued, in order, each operation once what it waits for has ended.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "abi.hpp"
#include "settings.hpp"

namespace emulator {

struct Context;
struct HostRange;
struct Stream;
using Lock = std::unique_lock<std::mutex>;

// The end of a stream's work up to a ticket.
struct Point {
    std::shared_ptr<Stream> stream;
    uint64_t ticket;
    bool reached() const;
};

// What an event was at one recording.
struct Recording {
    Point point;
    int64_t ended_ns = 0;
};

struct Operation {
    const char* kind;
    // of a kernel, or empty
    std::string name;
    uint64_t bytes = 0;
    // runs without the lock, on the stream's thread; an error loses the context
    std::function<CUresult(Random&)> run;
    // whether it runs in a context that is lost, as nothing else does
    bool runs_when_lost = false;
    std::vector<Point> after;
    // host memory that stays registered until the end
    std::vector<std::shared_ptr<HostRange>> host_ranges;
    // the error that it is made to end with
    CUresult injected = CUDA_SUCCESS;

    uint64_t ticket = 0;
    int64_t queued_ns = 0;
};

struct Stream {
    Context* context;
    unsigned number;
    // waits for the null stream and it for this one
    bool blocking;
    bool is_null = false;
    bool closing = false;
    uint64_t submitted = 0, completed = 0;
    std::deque<Operation> queue;
    // there is some, or there will be no more
    std::condition_variable work;
    // what its thread waits to begin; null while it has none or runs one
    Operation* next = nullptr;
    // it runs one that uses host memory, and ends before its context is lost
    bool runs = false;
};

// A stream with its thread.
std::shared_ptr<Stream> start_stream(Context& context, bool blocking);
// The null stream, from its first use.
std::shared_ptr<Stream> null_stream(Context& context);
// Takes no more work; what is queued still runs.
void close_stream(Stream& stream);

// Queues an operation; the point is its end.
Point enqueue(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation);

// All that is queued in a context now, in one stream, or (the null stream) in all that block.
std::vector<Point> work_of(const Context& context);
std::vector<Point> work_of(const std::shared_ptr<Stream>& stream);

// Ends a context by an error.
void lose(Lock& lock, Context& context, CUresult why);

// Waits. An error is that of the context, if it is lost by then.
CUresult wait_for(Lock& lock, const Context& context, const std::vector<Point>& points);

// Whether this thread runs a function of the program for a stream: no call is permitted then.
bool in_host_function();
// Marks this thread so, for the function's duration.
void call_host_function(CUhostFn function, void* data);

} // namespace emulator
