// Devices and contexts.

#include <cstring>
#include <pthread.h>

#include "call.hpp"
#include "faults.hpp"

using namespace emulator;

static Context* device(Call& call, CUdevice number) {
    auto& contexts = state().contexts;
    if (number >= 0 && static_cast<size_t>(number) < contexts.size()) return contexts[number].get();
    call.refused = call.wrong(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", number);
    return nullptr;
}

API cuInit(unsigned flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = injected("init", "cuInit", -1)) return error;
    State& all = state();
    if (all.forked) return CUDA_ERROR_NOT_INITIALIZED;
    Lock lock(all.mutex);
    if (settings().devices.empty()) return CUDA_ERROR_NO_DEVICE;
    if (all.initialised) return CUDA_SUCCESS;
    for (int physical : settings().devices) {
        auto context = std::make_unique<Context>();
        context->device = static_cast<int>(all.contexts.size());
        context->physical = physical;
        all.contexts.push_back(std::move(context));
    }
    all.memory.protect(all.contexts.size());
    catch_faults();
    pthread_atfork(nullptr, nullptr, [] { state().forked = true; });
    all.initialised = true;
    return CUDA_SUCCESS;
}

API cuDriverGetVersion(int* version) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = settings().driver_version;
    return CUDA_SUCCESS;
}

API cuGetErrorName(CUresult error, const char** name) {
    *name = error_name(error);
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API cuGetErrorString(CUresult error, const char** text) {
    *text = error_text(error);
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// ---- devices --------------------------------------------------------------------------------------------------------

API cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount", "device", Needs::Init);
    if (call.refused) return call.refused;
    *count = static_cast<int>(state().contexts.size());
    return CUDA_SUCCESS;
}

API cuDeviceGet(CUdevice* number, int ordinal) {
    Call call("cuDeviceGet", "device", Needs::Init);
    if (call.refused || !device(call, ordinal)) return call.refused;
    *number = ordinal;
    return CUDA_SUCCESS;
}

API cuDeviceGetName(char* name, int length, CUdevice number) {
    Call call("cuDeviceGetName", "device", Needs::Init);
    if (call.refused || !device(call, number)) return call.refused;
    if (length <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::strncpy(name, "Emulated on the host", length);
    name[length - 1] = 0;
    return CUDA_SUCCESS;
}

static CUresult uuid(const char* name, CUuuid* uuid, CUdevice number) {
    Call call(name, "device", Needs::Init);
    if (call.refused || !device(call, number)) return call.refused;
    std::memcpy(uuid->bytes, "emulated device", 15);
    uuid->bytes[15] = static_cast<char>(device(call, number)->physical);
    return CUDA_SUCCESS;
}
API cuDeviceGetUuid(CUuuid* out, CUdevice number) { return uuid("cuDeviceGetUuid", out, number); }
API cuDeviceGetUuid_v2(CUuuid* out, CUdevice number) { return uuid("cuDeviceGetUuid_v2", out, number); }

API cuDeviceTotalMem_v2(size_t* bytes, CUdevice number) {
    Call call("cuDeviceTotalMem_v2", "device", Needs::Init);
    if (call.refused || !device(call, number)) return call.refused;
    *bytes = settings().memory_bytes;
    return CUDA_SUCCESS;
}

// Those of a chip of compute capability 9.0 that describe what is emulated; what is not is 0.
static int attribute_of(const Context& context, int attribute) {
    switch (attribute) {
    case 1: // MAX_THREADS_PER_BLOCK
    case 2: // MAX_BLOCK_DIM_X
        return 1024;
    case 3: // MAX_BLOCK_DIM_Y, Z
    case 4:
        return 1;
    case 5: // MAX_GRID_DIM_X
        return 0x7fffffff;
    case 6: // MAX_GRID_DIM_Y, Z
    case 7:
        return 1;
    case 8: // MAX_SHARED_MEMORY_PER_BLOCK
        return 48 << 10;
    case 10: // WARP_SIZE
        return 32;
    case 11: // MAX_PITCH
        return 0x7fffffff;
    case 12: // MAX_REGISTERS_PER_BLOCK
        return 65536;
    case 13: // CLOCK_RATE, kHz
        return 1000000;
    case 15: // GPU_OVERLAP
        return 1;
    case 16: // MULTIPROCESSOR_COUNT
        return settings().multiprocessors;
    case 19: // CAN_MAP_HOST_MEMORY
        return 1;
    case 31: // CONCURRENT_KERNELS
        return 1;
    case 33: // PCI_BUS_ID
        return 0x10 + context.physical;
    case 39: // MAX_THREADS_PER_MULTIPROCESSOR
        return 2048;
    case 40: // ASYNC_ENGINE_COUNT
        return 2;
    case 41: // UNIFIED_ADDRESSING
        return 1;
    case 75: // COMPUTE_CAPABILITY_MAJOR
        return 9;
    case 78: // STREAM_PRIORITIES_SUPPORTED
        return 1;
    case 91: // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    case 99: // HOST_REGISTER_SUPPORTED
    case 113: // READ_ONLY_HOST_REGISTER_SUPPORTED
        return 1;
    default:
        return 0;
    }
}

API cuDeviceGetAttribute(int* value, int attribute, CUdevice number) {
    Call call("cuDeviceGetAttribute", "device", Needs::Init);
    if (call.refused || !device(call, number)) return call.refused;
    if (attribute <= 0) return CUDA_ERROR_INVALID_VALUE;
    *value = attribute_of(*device(call, number), attribute);
    return CUDA_SUCCESS;
}

API cuDeviceCanAccessPeer(int* can, CUdevice number, CUdevice peer) {
    Call call("cuDeviceCanAccessPeer", "device", Needs::Init);
    if (call.refused || !device(call, number) || !device(call, peer)) return call.refused;
    *can = number != peer;
    return CUDA_SUCCESS;
}

// ---- contexts -------------------------------------------------------------------------------------------------------

API cuDevicePrimaryCtxRetain(CUcontext* handle, CUdevice number) {
    Call call("cuDevicePrimaryCtxRetain", "context", Needs::Init);
    if (call.refused) return call.refused;
    Context* context = device(call, number);
    if (!context) return call.refused;
    state().progress.wait(call.lock, [&] { return !context->ending; });
    if (context->retained++ == 0) context->visible = uint32_t(1) << context->device;
    *handle = handle_of(*context);
    return CUDA_SUCCESS;
}

static CUresult release(const char* name, CUdevice number) {
    Call call(name, "context", Needs::Init);
    if (call.refused) return call.refused;
    Context* context = device(call, number);
    if (!context) return call.refused;
    if (context->retained == 0 || context->ending) {
        return call.wrong(CUDA_ERROR_INVALID_CONTEXT, "device %d has no context", number);
    }
    if (context->retained > 1) {
        --context->retained;
    } else {
        destroy(call.lock, *context);
    }
    return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease(CUdevice number) { return release("cuDevicePrimaryCtxRelease", number); }
API cuDevicePrimaryCtxRelease_v2(CUdevice number) { return release("cuDevicePrimaryCtxRelease_v2", number); }

API cuDevicePrimaryCtxGetState(CUdevice number, unsigned* flags, int* active) {
    Call call("cuDevicePrimaryCtxGetState", "context", Needs::Init);
    if (call.refused || !device(call, number)) return call.refused;
    *flags = 0;
    *active = device(call, number)->retained > 0;
    return CUDA_SUCCESS;
}

// Null makes none current.
static CUresult check_handle(Call& call, CUcontext handle) {
    bool destroyed = false;
    if (!handle || context_of(handle, &destroyed)) return CUDA_SUCCESS;
    return call.wrong(destroyed ? CUDA_ERROR_CONTEXT_IS_DESTROYED : CUDA_ERROR_INVALID_CONTEXT, "no context is %p",
                      static_cast<void*>(handle));
}

API cuCtxSetCurrent(CUcontext handle) {
    Call call("cuCtxSetCurrent", "context", Needs::Init);
    if (call.refused) return call.refused;
    if (CUresult error = check_handle(call, handle)) return error;
    auto& stack = context_stack();
    if (!stack.empty()) stack.pop_back();
    if (handle) stack.push_back(handle);
    return CUDA_SUCCESS;
}

API cuCtxGetCurrent(CUcontext* handle) {
    Call call("cuCtxGetCurrent", "context", Needs::Init);
    if (call.refused) return call.refused;
    *handle = current_context();
    return CUDA_SUCCESS;
}

API cuCtxPushCurrent_v2(CUcontext handle) {
    Call call("cuCtxPushCurrent_v2", "context", Needs::Init);
    if (call.refused) return call.refused;
    if (!handle) return CUDA_ERROR_INVALID_CONTEXT;
    if (CUresult error = check_handle(call, handle)) return error;
    context_stack().push_back(handle);
    return CUDA_SUCCESS;
}

API cuCtxPopCurrent_v2(CUcontext* handle) {
    Call call("cuCtxPopCurrent_v2", "context", Needs::Init);
    if (call.refused) return call.refused;
    auto& stack = context_stack();
    if (stack.empty()) return call.wrong(CUDA_ERROR_INVALID_CONTEXT, "no context is current");
    if (handle) *handle = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
}

API cuCtxGetDevice(CUdevice* number) {
    Call call("cuCtxGetDevice", "context", Needs::AnyContext);
    if (call.refused) return call.refused;
    *number = call.context->device;
    return CUDA_SUCCESS;
}

API cuCtxSynchronize() {
    Call call("cuCtxSynchronize", "sync", Needs::Context);
    if (call.refused) return call.refused;
    return wait_for(call.lock, *call.context, work_of(*call.context));
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    Call call("cuCtxGetStreamPriorityRange", "context", Needs::AnyContext);
    if (call.refused) return call.refused;
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

API cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    Call call("cuCtxEnablePeerAccess", "context", Needs::Context);
    if (call.refused) return call.refused;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult error = check_handle(call, peer)) return error;
    Context* other = context_of(peer);
    if (!other) return CUDA_ERROR_INVALID_CONTEXT;
    if (other == call.context) return call.wrong(CUDA_ERROR_INVALID_DEVICE, "a device is no peer of itself");
    uint32_t bit = uint32_t(1) << other->device;
    if (call.context->visible & bit) return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    call.context->visible |= bit;
    return CUDA_SUCCESS;
}

API cuCtxDisablePeerAccess(CUcontext peer) {
    Call call("cuCtxDisablePeerAccess", "context", Needs::Context);
    if (call.refused) return call.refused;
    Context* other = context_of(peer);
    uint32_t bit = other ? uint32_t(1) << other->device : 0;
    if (!other || other == call.context || !(call.context->visible & bit)) return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
    call.context->visible &= ~bit;
    return CUDA_SUCCESS;
}
