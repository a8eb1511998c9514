#include "driver.hpp"

#include <dlfcn.h>

#include "../cpp/settings.hpp"

namespace emulated_nccl {

template <class Function> static void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
}

static const Driver* look_up() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return nullptr;
    auto* found = new Driver{};
    find(library, "cuCtxGetCurrent", &found->current);
    find(library, "cuCtxSetCurrent", &found->make_current);
    find(library, "cuCtxGetDevice", &found->device);
    find(library, "cuDeviceGetUuid_v2", &found->uuid);
    find(library, "emulate_operation", &found->operate);
    find(library, "cuMemGetAddressRange_v2", &found->address_range);
    if (!found->operate) emulator::die("NCCL: libcuda.so.1 is not the emulated one");
    return found;
}

const Driver* driver() {
    static const Driver* const found = look_up();
    return found;
}

} // namespace emulated_nccl
