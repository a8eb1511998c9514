// Streams, events and functions of the program.

#include "call.hpp"

using namespace emulator;

// ---- streams --------------------------------------------------------------------------------------------------------

static CUresult create_stream(const char* name, CUstream* handle, unsigned flags) {
    Call call(name, "stream", Needs::Context);
    if (call.refused) return call.refused;
    if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream = start_stream(*call.context, flags != CU_STREAM_NON_BLOCKING);
    *handle = reinterpret_cast<CUstream>(state().streams.add(stream));
    return CUDA_SUCCESS;
}
API cuStreamCreate(CUstream* handle, unsigned flags) { return create_stream("cuStreamCreate", handle, flags); }
// Any priority: none promises anything.
API cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int) {
    return create_stream("cuStreamCreateWithPriority", handle, flags);
}

API cuStreamDestroy_v2(CUstream handle) {
    Call call("cuStreamDestroy_v2", "stream", Needs::AnyContext);
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = state().streams.find(handle);
    if (!stream) return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no stream is %p", static_cast<void*>(handle));
    state().streams.remove(handle);
    // what is queued still runs
    close_stream(*stream);
    return call.context->lost;
}

API cuStreamQuery(CUstream handle) {
    Call call("cuStreamQuery", "query", Needs::Context);
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream) return call.refused;
    for (const Point& point : work_of(stream)) {
        if (!point.reached()) return CUDA_ERROR_NOT_READY;
    }
    return stream->context->lost;
}

API cuStreamSynchronize(CUstream handle) {
    Call call("cuStreamSynchronize", "sync", Needs::Context);
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream) return call.refused;
    return wait_for(call.lock, *stream->context, work_of(stream));
}

static CUresult no_operation(Random&) { return CUDA_SUCCESS; }

API cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    Call call = Call::queueing("cuStreamWaitEvent", "wait");
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream) return call.refused;
    std::shared_ptr<Event> event = state().events.find(event_handle);
    if (!event) return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no event is %p", static_cast<void*>(event_handle));
    if (flags > 1) return CUDA_ERROR_INVALID_VALUE;
    // one that was never recorded does not delay
    if (!event->recording) return CUDA_SUCCESS;
    Operation operation;
    operation.kind = "wait";
    operation.run = no_operation;
    operation.after.push_back(event->recording->point);
    operation.injected = call.injected;
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

API cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
    Call call = Call::queueing("cuLaunchHostFunc", "host");
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream) return call.refused;
    if (!function) return CUDA_ERROR_INVALID_VALUE;
    Operation operation;
    operation.kind = "host";
    operation.injected = call.injected;
    operation.run = [=](Random&) {
        Access none(0);
        call_host_function(function, data);
        return CUDA_SUCCESS;
    };
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

// For other emulated libraries: a function that works as the device does, and reaches the memory that it reaches.
API emulate_operation(CUstream handle, const char* kind, uint64_t bytes, CUhostFn function, void* data) {
    Call call = Call::queueing("emulate_operation", kind);
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream) return call.refused;
    Operation operation;
    operation.kind = kind;
    operation.bytes = bytes;
    operation.injected = call.injected;
    operation.run = [=, visible = stream->context->visible](Random&) {
        Access access(visible);
        call_host_function(function, data);
        return CUDA_SUCCESS;
    };
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

// ---- events ---------------------------------------------------------------------------------------------------------

API cuEventCreate(CUevent* handle, unsigned flags) {
    Call call("cuEventCreate", "event", Needs::Context);
    if (call.refused) return call.refused;
    if (flags & ~(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (flags & CU_EVENT_INTERPROCESS) {
        return call.wrong(CUDA_ERROR_NOT_SUPPORTED, "events between processes are not emulated");
    }
    auto event = std::make_shared<Event>(Event{call.context, flags, nullptr});
    *handle = reinterpret_cast<CUevent>(state().events.add(event));
    return CUDA_SUCCESS;
}

static std::shared_ptr<Event> event_of(Call& call, CUevent handle) {
    std::shared_ptr<Event> event = state().events.find(handle);
    if (!event) call.refused = call.wrong(CUDA_ERROR_INVALID_HANDLE, "no event is %p", static_cast<void*>(handle));
    return event;
}

API cuEventDestroy_v2(CUevent handle) {
    Call call("cuEventDestroy_v2", "event", Needs::AnyContext);
    if (call.refused || !event_of(call, handle)) return call.refused;
    state().events.remove(handle);
    return call.context->lost;
}

API cuEventRecord(CUevent handle, CUstream stream_handle) {
    Call call = Call::queueing("cuEventRecord", "record");
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(stream_handle);
    std::shared_ptr<Event> event = stream ? event_of(call, handle) : nullptr;
    if (!event) return call.refused;
    if (event->context != stream->context) {
        return call.wrong(CUDA_ERROR_INVALID_HANDLE, "the event is of device %d, the stream of device %d",
                          event->context->device, stream->context->device);
    }
    auto recording = std::make_shared<Recording>();
    Operation operation;
    operation.kind = "record";
    operation.injected = call.injected;
    operation.run = [=](Random&) {
        recording->ended_ns = now_ns();
        return CUDA_SUCCESS;
    };
    recording->point = enqueue(call.lock, stream, std::move(operation));
    event->recording = recording;
    return CUDA_SUCCESS;
}

API cuEventQuery(CUevent handle) {
    Call call("cuEventQuery", "query", Needs::Context);
    std::shared_ptr<Event> event = call.refused ? nullptr : event_of(call, handle);
    if (!event) return call.refused;
    if (event->recording && !event->recording->point.reached()) return CUDA_ERROR_NOT_READY;
    return event->context->lost;
}

API cuEventSynchronize(CUevent handle) {
    Call call("cuEventSynchronize", "sync", Needs::Context);
    std::shared_ptr<Event> event = call.refused ? nullptr : event_of(call, handle);
    if (!event) return call.refused;
    if (!event->recording) return CUDA_SUCCESS;
    return wait_for(call.lock, *event->context, {event->recording->point});
}

static CUresult elapsed(const char* name, float* milliseconds, CUevent start_handle, CUevent end_handle) {
    Call call(name, "event", Needs::Context);
    std::shared_ptr<Event> start = call.refused ? nullptr : event_of(call, start_handle);
    std::shared_ptr<Event> end = start ? event_of(call, end_handle) : nullptr;
    if (!end) return call.refused;
    for (const auto& event : {start, end}) {
        const char* why = event->flags & CU_EVENT_DISABLE_TIMING ? "an event without time"
                          : !event->recording                    ? "an event that was never recorded"
                                                                 : nullptr;
        if (why) return call.wrong(CUDA_ERROR_INVALID_HANDLE, "%s", why);
    }
    if (!start->recording->point.reached() || !end->recording->point.reached()) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>(end->recording->ended_ns - start->recording->ended_ns) / 1e6f;
    return CUDA_SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return elapsed("cuEventElapsedTime", milliseconds, start, end);
}
API cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return elapsed("cuEventElapsedTime_v2", milliseconds, start, end);
}
