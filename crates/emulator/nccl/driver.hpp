// The functions of the emulated CUDA driver that are called, found as a program would find them.
#pragma once

#include "../cpp/abi.hpp"

namespace emulated_nccl {

struct Driver {
    CUresult (*current)(CUcontext*);
    CUresult (*make_current)(CUcontext);
    CUresult (*device)(CUdevice*);
    CUresult (*uuid)(CUuuid*, CUdevice);
    // of the emulated driver only: stream, kind, bytes
    CUresult (*operate)(CUstream, const char*, uint64_t, CUhostFn, void*);
    CUresult (*address_range)(CUdeviceptr*, size_t*, CUdeviceptr);
};

// Null where there is no driver.
const Driver* driver();

} // namespace emulated_nccl
