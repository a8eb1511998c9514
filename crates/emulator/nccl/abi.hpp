// What of NCCL's interface is emulated: types, numbers and signatures as programs know them.
//
// Source: nccl.h 2.27.7, the version that this library says it is.
#pragma once

#include <climits>
#include <cstddef>

#include "../cpp/abi.hpp"

using ncclResult_t = int;
using ncclComm_t = struct ncclComm*;
struct ncclUniqueId {
    char internal[128];
};

constexpr int VERSION = 22707;
constexpr ncclResult_t ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3,
                       ncclInvalidArgument = 4, ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7;
constexpr int UNDEFINED_INT = INT_MIN;
constexpr unsigned MAGIC = 0xcafebeef;

// As far as it is looked at; programs hand over as much of it as their version has.
struct ncclConfig_t {
    size_t size;
    unsigned magic;
    unsigned version;
    int blocking;
    int cgaClusterSize;
    int minCTAs;
    int maxCTAs;
    const char* netName;
    int splitShare;
};

#define NCCL_API(type) extern "C" __attribute__((visibility("default"))) type
