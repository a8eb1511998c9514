// What of the CUDA driver's interface is emulated: types, numbers and signatures as programs know them.
//
// Source: the bindings of cudarc 0.19 (driver/sys), made from CUDA's cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUhostFn = void (*)(void*);
struct CUuuid {
    char bytes[16];
};
struct CUipcMemHandle {
    char reserved[64];
};

// Name, number, text.
#define CUDA_ERRORS(ERROR)                                                                                            \
    ERROR(INVALID_VALUE, 1, "invalid argument")                                                                       \
    ERROR(OUT_OF_MEMORY, 2, "out of memory")                                                                          \
    ERROR(NOT_INITIALIZED, 3, "initialization error")                                                                 \
    ERROR(DEINITIALIZED, 4, "driver shutting down")                                                                   \
    ERROR(STUB_LIBRARY, 34, "CUDA driver is a stub library")                                                          \
    ERROR(DEVICE_UNAVAILABLE, 46, "CUDA-capable device(s) is/are busy or unavailable")                                \
    ERROR(NO_DEVICE, 100, "no CUDA-capable device is detected")                                                       \
    ERROR(INVALID_DEVICE, 101, "invalid device ordinal")                                                              \
    ERROR(INVALID_IMAGE, 200, "device kernel image is invalid")                                                       \
    ERROR(INVALID_CONTEXT, 201, "invalid device context")                                                             \
    ERROR(MAP_FAILED, 205, "mapping of buffer object failed")                                                         \
    ERROR(NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                         \
    ERROR(ECC_UNCORRECTABLE, 214, "uncorrectable ECC error encountered")                                              \
    ERROR(UNSUPPORTED_LIMIT, 215, "limit is not supported on this architecture")                                      \
    ERROR(PEER_ACCESS_UNSUPPORTED, 217, "peer access is not supported between these two devices")                     \
    ERROR(INVALID_PTX, 218, "a PTX JIT compilation failed")                                                           \
    ERROR(NVLINK_UNCORRECTABLE, 220, "uncorrectable NVLink error detected during the execution")                      \
    ERROR(JIT_COMPILER_NOT_FOUND, 221, "PTX JIT compiler library not found")                                          \
    ERROR(UNSUPPORTED_PTX_VERSION, 222, "the provided PTX was compiled with an unsupported toolchain.")               \
    ERROR(FILE_NOT_FOUND, 301, "file not found")                                                                      \
    ERROR(OPERATING_SYSTEM, 304, "OS call failed or operation not supported on this OS")                              \
    ERROR(INVALID_HANDLE, 400, "invalid resource handle")                                                             \
    ERROR(ILLEGAL_STATE, 401, "the operation cannot be performed in the present state")                               \
    ERROR(NOT_FOUND, 500, "named symbol not found")                                                                   \
    ERROR(NOT_READY, 600, "device not ready")                                                                         \
    ERROR(ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                           \
    ERROR(LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch")                                    \
    ERROR(LAUNCH_TIMEOUT, 702, "the launch timed out and was terminated")                                             \
    ERROR(PEER_ACCESS_ALREADY_ENABLED, 704, "peer access is already enabled")                                         \
    ERROR(PEER_ACCESS_NOT_ENABLED, 705, "peer access has not been enabled")                                           \
    ERROR(CONTEXT_IS_DESTROYED, 709, "context is destroyed")                                                          \
    ERROR(ASSERT, 710, "device-side assert triggered")                                                                \
    ERROR(TOO_MANY_PEERS, 711, "peer mapping resources exhausted")                                                    \
    ERROR(HOST_MEMORY_ALREADY_REGISTERED, 712, "part or all of the requested memory range is already mapped")         \
    ERROR(HOST_MEMORY_NOT_REGISTERED, 713, "pointer does not correspond to a registered memory region")               \
    ERROR(HARDWARE_STACK_ERROR, 714, "hardware stack error")                                                          \
    ERROR(ILLEGAL_INSTRUCTION, 715, "an illegal instruction was encountered")                                         \
    ERROR(MISALIGNED_ADDRESS, 716, "misaligned address")                                                              \
    ERROR(INVALID_ADDRESS_SPACE, 717, "operation not supported on global/shared address space")                       \
    ERROR(INVALID_PC, 718, "invalid program counter")                                                                 \
    ERROR(LAUNCH_FAILED, 719, "unspecified launch failure")                                                           \
    ERROR(NOT_PERMITTED, 800, "operation not permitted")                                                              \
    ERROR(NOT_SUPPORTED, 801, "operation not supported")                                                              \
    ERROR(SYSTEM_NOT_READY, 802, "system not yet initialized")                                                        \
    ERROR(SYSTEM_DRIVER_MISMATCH, 803, "system has unsupported display driver / cuda driver combination")             \
    ERROR(EXTERNAL_DEVICE, 911, "operation failed on an external device")                                             \
    ERROR(UNKNOWN, 999, "unknown error")

constexpr CUresult CUDA_SUCCESS = 0;
#define ERROR(name, number, text) constexpr CUresult CUDA_ERROR_##name = number;
CUDA_ERRORS(ERROR)
#undef ERROR

// Flags and attributes that mean something here.
constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned CU_EVENT_BLOCKING_SYNC = 1, CU_EVENT_DISABLE_TIMING = 2, CU_EVENT_INTERPROCESS = 4;
constexpr unsigned CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1;
constexpr unsigned CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2;

#define API extern "C" __attribute__((visibility("default"))) CUresult
