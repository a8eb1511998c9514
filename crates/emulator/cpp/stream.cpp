#include "stream.hpp"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <thread>

#include "faults.hpp"
#include "state.hpp"

namespace emulator {

bool Point::reached() const { return stream->completed >= ticket; }

static bool all_reached(const std::vector<Point>& points) {
    return std::all_of(points.begin(), points.end(), [](const Point& point) { return point.reached(); });
}

std::vector<Point> work_of(const Context& context) {
    std::vector<Point> points;
    for (const auto& stream : context.streams) points.push_back({stream, stream->submitted});
    return points;
}

std::vector<Point> work_of(const std::shared_ptr<Stream>& stream) {
    std::vector<Point> points = {{stream, stream->submitted}};
    if (stream->is_null) {
        for (const auto& other : stream->context->streams) {
            if (other->blocking) points.push_back({other, other->submitted});
        }
    }
    return points;
}

CUresult wait_for(Lock& lock, const Context& context, const std::vector<Point>& points) {
    State& all = state();
    all.awaited.push_back(&points);
    all.progress.notify_all();
    all.progress.wait(lock, [&] { return all_reached(points); });
    all.awaited.erase(std::find(all.awaited.begin(), all.awaited.end(), &points));
    return context.lost;
}

// Whether a point can only be reached after an operation: directly, or by way of what other streams wait to begin.
static bool is_behind(const Point& point, const Stream& stream, const Operation& operation) {
    if (point.reached()) return false;
    if (point.stream.get() == &stream) return point.ticket >= operation.ticket;
    const Operation* next = point.stream->next;
    if (!next || next->ticket > point.ticket) return false;
    return std::any_of(next->after.begin(), next->after.end(),
                       [&](const Point& before) { return is_behind(before, stream, operation); });
}

static bool is_awaited(const Stream& stream, const Operation& operation) {
    for (const auto* points : state().awaited) {
        for (const Point& point : *points) {
            if (is_behind(point, stream, operation)) return true;
        }
    }
    return false;
}

// As late as settings allow: until then, or until somebody waits for it.
static void be_late(Lock& lock, const Stream& stream, const Operation& operation) {
    if (settings().late_us == 0) return;
    auto time = std::chrono::nanoseconds(operation.queued_ns) + std::chrono::microseconds(settings().late_us);
    // steady_clock is the clock of now_ns
    std::chrono::steady_clock::time_point latest(time);
    state().progress.wait_until(lock, latest, [&] { return is_awaited(stream, operation); });
}

Point enqueue(Lock&, const std::shared_ptr<Stream>& stream, Operation operation) {
    if (stream->is_null) {
        for (Point& point : work_of(stream)) {
            if (point.stream != stream && !point.reached()) operation.after.push_back(point);
        }
    } else if (stream->blocking && stream->context->null_stream) {
        const auto& null = stream->context->null_stream;
        operation.after.push_back({null, null->submitted});
    }
    operation.ticket = ++stream->submitted;
    operation.queued_ns = now_ns();
    for (const auto& range : operation.host_ranges) ++range->uses;
    Point end = {stream, operation.ticket};
    stream->queue.push_back(std::move(operation));
    stream->work.notify_one();
    return end;
}

// What never runs needs no memory.
static void forget(Operation& operation) {
    if (operation.runs_when_lost) return;
    for (const auto& range : operation.host_ranges) --range->uses;
    operation.host_ranges.clear();
}

// When the program learns of it, nothing of the context uses host memory any more, nor will.
void lose(Lock& lock, Context& context, CUresult why) {
    if (context.failing) return;
    context.failing = true;
    state().progress.notify_all();
    state().progress.wait(lock, [&] {
        return std::none_of(context.streams.begin(), context.streams.end(), [](const auto& s) { return s->runs; });
    });
    for (const auto& stream : context.streams) {
        if (stream->next) forget(*stream->next);
        for (Operation& operation : stream->queue) forget(operation);
    }
    context.lost = why;
}

// ---- the thread of a stream -----------------------------------------------------------------------------------------

static CUresult run_operation(const Operation& operation, bool lost, Random& random) {
    if (lost && !operation.runs_when_lost) return CUDA_SUCCESS;
    delay(random);
    if (operation.injected != CUDA_SUCCESS) return operation.injected;
    return operation.run(random);
}

static void end_operation(Lock& lock, Stream& stream, const Operation& operation, CUresult result, int64_t start_ns) {
    Context& context = *stream.context;
    stream.runs = false;
    if (result != CUDA_SUCCESS && !context.failing) {
        lose(lock, context, result);
        report("device %d is lost: %s in %s %s of stream %u", context.device, error_name(result), operation.kind,
               operation.name.c_str(), stream.number);
    }
    for (const auto& range : operation.host_ranges) --range->uses;
    log_line("op %d %u %s %" PRIu64 " %s %" PRId64 " %" PRId64 " %" PRId64 " %s", context.physical, stream.number,
             operation.kind, operation.bytes, operation.name.empty() ? "-" : operation.name.c_str(),
             operation.queued_ns, start_ns, now_ns(), error_name(context.lost));
    stream.completed = operation.ticket;
}

static void run_stream(const std::shared_ptr<Stream>& stream) {
    FaultStack fault_stack;
    State& all = state();
    Random random(settings().seed * 1000003 + stream->context->physical * 1009 + stream->number);
    Lock lock(all.mutex);
    for (;;) {
        stream->work.wait(lock, [&] { return !stream->queue.empty() || stream->closing; });
        if (stream->queue.empty()) break;
        Operation operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->next = &operation;
        all.progress.wait(lock, [&] { return all_reached(operation.after); });
        be_late(lock, *stream, operation);
        stream->next = nullptr;
        bool lost = stream->context->failing;
        stream->runs = !lost && !operation.runs_when_lost && !operation.host_ranges.empty();
        lock.unlock();
        int64_t start_ns = now_ns();
        CUresult result = run_operation(operation, lost, random);
        lock.lock();
        end_operation(lock, *stream, operation, result, start_ns);
        all.progress.notify_all();
    }
    auto& streams = stream->context->streams;
    streams.erase(std::remove(streams.begin(), streams.end(), stream), streams.end());
}

// Signals of the process are for the program's threads; those that a fault raises stay deliverable.
static void with_signals_blocked(const std::function<void()>& start) {
    sigset_t all, before;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    start();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

std::shared_ptr<Stream> start_stream(Context& context, bool blocking) {
    auto stream = std::make_shared<Stream>();
    stream->context = &context;
    stream->number = context.streams_made++;
    stream->blocking = blocking;
    context.streams.push_back(stream);
    with_signals_blocked([&] { std::thread(run_stream, stream).detach(); });
    return stream;
}

void close_stream(Stream& stream) {
    stream.closing = true;
    stream.work.notify_one();
}

std::shared_ptr<Stream> null_stream(Context& context) {
    if (!context.null_stream) {
        context.null_stream = start_stream(context, false);
        context.null_stream->is_null = true;
    }
    return context.null_stream;
}

// ---- functions of the program ---------------------------------------------------------------------------------------

static thread_local bool calls_host_function = false;

bool in_host_function() { return calls_host_function; }

void call_host_function(CUhostFn function, void* data) {
    calls_host_function = true;
    function(data);
    calls_host_function = false;
}

} // namespace emulator
