// Memory of devices and of the host, and copies between them.

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "call.hpp"
#include "faults.hpp"

using namespace emulator;

// ---- device memory --------------------------------------------------------------------------------------------------

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    Call call("cuMemGetInfo_v2", "memory", Needs::Context);
    if (call.refused) return call.refused;
    *total = settings().memory_bytes;
    *free = settings().memory_bytes - settings().memory_bytes / 32 - call.context->used_bytes;
    return CUDA_SUCCESS;
}

API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    Call call("cuMemAlloc_v2", "alloc", Needs::Context);
    if (call.refused) return call.refused;
    return state().memory.allocate(*call.context, bytes, address);
}

API cuMemFree_v2(CUdeviceptr address) {
    Call call("cuMemFree_v2", "free", Needs::Context);
    if (call.refused) return call.refused;
    Memory& memory = state().memory;
    Allocation* allocation = memory.at(address);
    if (!allocation || allocation->opened != 0) {
        return call.wrong(CUDA_ERROR_INVALID_VALUE, "no allocation starts at %#llx", address);
    }
    Context& owner = *allocation->owner;
    CUresult lost = wait_for(call.lock, owner, work_of(owner));
    // another thread may have freed it meanwhile
    if (!memory.at(address)) return call.wrong(CUDA_ERROR_INVALID_VALUE, "%#llx is freed twice", address);
    memory.free(address);
    return lost;
}

API cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
    Call call("cuMemGetAddressRange_v2", "memory", Needs::Context);
    if (call.refused) return call.refused;
    Allocation* allocation = state().memory.holding(address, 1);
    if (!allocation) return CUDA_ERROR_NOT_FOUND;
    if (start) *start = allocation->address;
    if (bytes) *bytes = allocation->bytes;
    return CUDA_SUCCESS;
}

// ---- host memory ----------------------------------------------------------------------------------------------------

constexpr unsigned CU_MEMHOSTREGISTER_READ_ONLY = 8;

API cuMemHostRegister_v2(void* address, size_t bytes, unsigned flags) {
    Call call("cuMemHostRegister_v2", "register", Needs::Context);
    if (call.refused) return call.refused;
    bool read_only = (flags & CU_MEMHOSTREGISTER_READ_ONLY) != 0;
    return state().memory.register_host(*call.context, reinterpret_cast<uint64_t>(address), bytes, read_only);
}

API cuMemHostUnregister(void* address) {
    Call call("cuMemHostUnregister", "unregister", Needs::Context);
    if (call.refused) return call.refused;
    return state().memory.unregister_host(reinterpret_cast<uint64_t>(address));
}

static CUresult allocate_host(const char* name, void** address, size_t bytes) {
    Call call(name, "hostalloc", Needs::Context);
    if (call.refused) return call.refused;
    return state().memory.allocate_host(*call.context, bytes, address);
}
API cuMemHostAlloc(void** address, size_t bytes, unsigned) { return allocate_host("cuMemHostAlloc", address, bytes); }
API cuMemAllocHost_v2(void** address, size_t bytes) { return allocate_host("cuMemAllocHost_v2", address, bytes); }

API cuMemFreeHost(void* address) {
    Call call("cuMemFreeHost", "hostfree", Needs::Context);
    if (call.refused) return call.refused;
    return state().memory.free_host(reinterpret_cast<uint64_t>(address));
}

API cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned flags) {
    Call call("cuMemHostGetDevicePointer_v2", "memory", Needs::Context);
    if (call.refused) return call.refused;
    uint64_t address = reinterpret_cast<uint64_t>(host);
    if (flags != 0 || !state().memory.host_range(address, 1)) return CUDA_ERROR_INVALID_VALUE;
    *device = address;
    return CUDA_SUCCESS;
}

API cuPointerGetAttribute(void* data, int attribute, CUdeviceptr address) {
    Call call("cuPointerGetAttribute", "memory", Needs::Init);
    if (call.refused) return call.refused;
    Allocation* allocation = state().memory.holding(address, 1);
    auto host = state().memory.host_range(address, 1);
    if (!allocation && !host) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
    case 1: // CONTEXT
        if (!allocation) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<CUcontext*>(data) = handle_of(*allocation->owner);
        return CUDA_SUCCESS;
    case 2: // MEMORY_TYPE
        *static_cast<unsigned*>(data) = allocation ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        return CUDA_SUCCESS;
    case 3: // DEVICE_POINTER
        *static_cast<CUdeviceptr*>(data) = address;
        return CUDA_SUCCESS;
    case 4: // HOST_POINTER
        if (allocation) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<void**>(data) = reinterpret_cast<void*>(address);
        return CUDA_SUCCESS;
    case 8: // IS_MANAGED
        *static_cast<int*>(data) = 0;
        return CUDA_SUCCESS;
    case 9: // DEVICE_ORDINAL
        *static_cast<int*>(data) = allocation ? allocation->owner->device : 0;
        return CUDA_SUCCESS;
    case 11: // RANGE_START_ADDR
        *static_cast<CUdeviceptr*>(data) = allocation ? allocation->address : host->address;
        return CUDA_SUCCESS;
    case 12: // RANGE_SIZE
        *static_cast<size_t*>(data) = allocation ? allocation->bytes : host->bytes;
        return CUDA_SUCCESS;
    case 13: // MAPPED
        *static_cast<int*>(data) = 1;
        return CUDA_SUCCESS;
    default:
        return call.wrong(CUDA_ERROR_NOT_SUPPORTED, "pointer attribute %d is not emulated", attribute);
    }
}

// ---- copies ---------------------------------------------------------------------------------------------------------

struct Transfer {
    void* to;
    const void* from;
    size_t bytes;
};

static void transfer(void* data) {
    const Transfer& it = *static_cast<const Transfer*>(data);
    std::memcpy(it.to, it.from, it.bytes);
}

static void spoil(void* data) {
    const Transfer& it = *static_cast<const Transfer*>(data);
    std::memset(it.to, GARBAGE, it.bytes);
}

// A fault in a copy: memory that was there when it was queued.
static void run_memory(void (*body)(void*), Transfer& it, const char* kind) {
    Fault fault;
    if (runs_to_its_end(body, &it, &fault)) return;
    die("memory at %p of a queued %s of %zu bytes is gone: host memory that is not there any more, or memory of "
        "another process that was closed",
        fault.address, kind, it.bytes);
}

static bool overlap(const Transfer& it) {
    uint64_t to = reinterpret_cast<uint64_t>(it.to), from = reinterpret_cast<uint64_t>(it.from);
    return to < from + it.bytes && from < to + it.bytes;
}

// Who looks at the target before the end sees garbage, with some luck; and the copy takes its time.
static CUresult copy_now(Transfer it, const char* kind, Random& random) {
    Access access(ALL_DEVICES);
    int64_t start = now_ns();
    if (settings().seed != 0 && !overlap(it)) {
        run_memory(spoil, it, kind);
        delay(random);
    }
    run_memory(transfer, it, kind);
    take_the_time(start);
    return CUDA_SUCCESS;
}

static Operation copy_operation(const Call& call, const char* kind, Transfer it) {
    Operation operation;
    operation.kind = kind;
    operation.bytes = it.bytes;
    operation.injected = call.injected;
    operation.run = [=](Random& random) { return copy_now(it, kind, random); };
    return operation;
}

static void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

static bool is_device_memory(Call& call, CUdeviceptr address, size_t bytes) {
    if (state().memory.holding(address, bytes)) return true;
    call.refused = call.wrong(CUDA_ERROR_INVALID_VALUE, "%zu bytes at %#llx are not in one allocation", bytes, address);
    return false;
}

// `range`: the pinned memory that it is, or null for pageable memory.
static bool is_host_memory(Call& call, const void* host, size_t bytes, std::shared_ptr<HostRange>* range) {
    uint64_t address = reinterpret_cast<uint64_t>(host);
    bool partly = false;
    *range = state().memory.host_range(address, bytes, &partly);
    if (!partly && host && !state().memory.is_device_address(address)) return true;
    const char* why = partly ? "partly pinned" : "not of the host";
    call.refused = call.wrong(CUDA_ERROR_INVALID_VALUE, "%zu bytes at %p are %s", bytes, host, why);
    return false;
}

// Pageable memory is read, or written, before the call returns; pinned memory when the stream comes to it. Synchronous
// calls go through the null stream, and need not have reached the device when the source is pageable.
static CUresult host_to_device(Call call, CUdeviceptr to, const void* from, size_t bytes, CUstream handle, bool waits) {
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream || bytes == 0) return call.refused;
    std::shared_ptr<HostRange> pinned;
    if (!is_device_memory(call, to, bytes) || !is_host_memory(call, from, bytes, &pinned)) return call.refused;
    if (pinned) {
        Operation operation = copy_operation(call, "htod", {pointer(to), from, bytes});
        operation.host_ranges.push_back(pinned);
        Point end = enqueue(call.lock, stream, std::move(operation));
        return waits ? wait_for(call.lock, *call.context, {end}) : CUDA_SUCCESS;
    }
    if (waits) {
        if (CUresult lost = wait_for(call.lock, *call.context, work_of(stream))) return lost;
    }
    auto staged = std::make_shared<std::vector<char>>(bytes);
    call.lock.unlock();
    std::memcpy(staged->data(), from, bytes);
    call.lock.lock();
    Operation operation = copy_operation(call, "htod", {pointer(to), staged->data(), bytes});
    auto run = std::move(operation.run);
    operation.run = [=](Random& random) {
        (void)staged;
        return run(random);
    };
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

static CUresult device_to_host(Call call, void* to, CUdeviceptr from, size_t bytes, CUstream handle, bool waits) {
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream || bytes == 0) return call.refused;
    std::shared_ptr<HostRange> pinned;
    if (!is_device_memory(call, from, bytes) || !is_host_memory(call, to, bytes, &pinned)) return call.refused;
    Operation operation = copy_operation(call, "dtoh", {to, pointer(from), bytes});
    if (pinned) operation.host_ranges.push_back(pinned);
    Point end = enqueue(call.lock, stream, std::move(operation));
    return waits || !pinned ? wait_for(call.lock, *call.context, {end}) : CUDA_SUCCESS;
}

static CUresult device_to_device(Call call, CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream || bytes == 0) return call.refused;
    if (!is_device_memory(call, to, bytes) || !is_device_memory(call, from, bytes)) return call.refused;
    Transfer it = {pointer(to), pointer(from), bytes};
    if (overlap(it)) return call.wrong(CUDA_ERROR_INVALID_VALUE, "source and target overlap");
    enqueue(call.lock, stream, copy_operation(call, "dtod", it));
    return CUDA_SUCCESS;
}

API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return host_to_device(Call::queueing("cuMemcpyHtoDAsync_v2", "copy"), to, from, bytes, stream, false);
}
API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return host_to_device(Call::queueing("cuMemcpyHtoD_v2", "copy"), to, from, bytes, nullptr, true);
}
API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return device_to_host(Call::queueing("cuMemcpyDtoHAsync_v2", "copy"), to, from, bytes, stream, false);
}
API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return device_to_host(Call::queueing("cuMemcpyDtoH_v2", "copy"), to, from, bytes, nullptr, true);
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return device_to_device(Call::queueing("cuMemcpyDtoDAsync_v2", "copy"), to, from, bytes, stream);
}
// Not synchronous: "no host-side synchronization is performed".
API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return device_to_device(Call::queueing("cuMemcpyDtoD_v2", "copy"), to, from, bytes, nullptr);
}

struct Fill {
    CUdeviceptr to;
    unsigned char value;
    size_t bytes;
};

static CUresult fill(Call call, Fill it, CUstream handle) {
    if (call.refused) return call.refused;
    std::shared_ptr<Stream> stream = call.stream(handle);
    if (!stream || it.bytes == 0 || !is_device_memory(call, it.to, it.bytes)) return call.refused;
    Operation operation;
    operation.kind = "memset";
    operation.bytes = it.bytes;
    operation.injected = call.injected;
    operation.run = [=](Random&) {
        Access access(ALL_DEVICES);
        std::memset(pointer(it.to), it.value, it.bytes);
        return CUDA_SUCCESS;
    };
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    return fill(Call::queueing("cuMemsetD8Async", "memset"), {to, value, bytes}, stream);
}
// Not synchronous either, as the target is device memory.
API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    return fill(Call::queueing("cuMemsetD8_v2", "memset"), {to, value, bytes}, nullptr);
}

// ---- memory of other processes --------------------------------------------------------------------------------------

API cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
    Call call("cuIpcGetMemHandle", "ipc", Needs::Context);
    if (call.refused) return call.refused;
    Allocation* allocation = state().memory.at(address);
    if (!allocation) return call.wrong(CUDA_ERROR_INVALID_VALUE, "no allocation starts at %#llx", address);
    return state().memory.export_handle(*allocation, handle);
}

API cuIpcOpenMemHandle_v2(CUdeviceptr* address, CUipcMemHandle handle, unsigned flags) {
    Call call("cuIpcOpenMemHandle_v2", "ipc", Needs::Context);
    if (call.refused) return call.refused;
    if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
    return state().memory.open_handle(*call.context, handle, address);
}

API cuIpcCloseMemHandle(CUdeviceptr address) {
    Call call("cuIpcCloseMemHandle", "ipc", Needs::Context);
    if (call.refused) return call.refused;
    CUresult closed = state().memory.close_handle(address);
    return closed ? call.wrong(closed, "no memory of another process is open at %#llx", address) : closed;
}
