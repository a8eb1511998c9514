// Modules of PTX, whose kernels are those compiled into this library, and their launches.

#include <cinttypes>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>

#include "call.hpp"
#include "faults.hpp"

using namespace emulator;

// ---- modules --------------------------------------------------------------------------------------------------------

static const Kernel* kernel_named(const std::string& name) {
    for (size_t i = 0; i < KERNEL_COUNT; ++i) {
        if (name == KERNELS[i].name) return &KERNELS[i];
    }
    return nullptr;
}

// The newest PTX that a driver compiles, times ten. Source: PTX ISA, table of release notes.
static int ptx_version_max(int driver) {
    struct Since {
        int driver, ptx;
    };
    constexpr Since ALL[] = {{13010, 91}, {13000, 90}, {12090, 88}, {12080, 87}, {12070, 86}, {12050, 85},
                             {12040, 84}, {12030, 83}, {12020, 82}, {12010, 81}, {12000, 80}};
    for (const Since& since : ALL) {
        if (driver >= since.driver) return since.ptx;
    }
    return 78;
}

// The number after a directive, as digits without their dot; −1: there is no such directive.
static int directive(const std::string& ptx, const char* name) {
    size_t at = ptx.find(name);
    if (at == std::string::npos) return -1;
    int digits = 0;
    for (at += std::strlen(name); at < ptx.size() && (std::isdigit(ptx[at]) || ptx[at] == '.'); ++at) {
        if (ptx[at] != '.') digits = digits * 10 + (ptx[at] - '0');
    }
    return digits;
}

// Entries with the threads of a block that .maxntid allows.
static std::map<std::string, unsigned> entries_of(const std::string& ptx) {
    std::map<std::string, unsigned> entries;
    const std::string entry = ".entry ", most = ".maxntid ";
    for (size_t at = ptx.find(entry); at != std::string::npos; at = ptx.find(entry, at)) {
        at += entry.size();
        std::string name = ptx.substr(at, ptx.find_first_of("( \t\n", at) - at);
        size_t body = ptx.find('{', at), limit = ptx.find(most, at);
        bool limited = limit != std::string::npos && limit < body;
        entries[name] = limited ? std::strtoul(ptx.c_str() + limit + most.size(), nullptr, 10) : 0;
    }
    return entries;
}

// Parameters as the PTX declares them are those of the kernel that runs instead.
static bool same_params(const std::string& ptx, const Kernel& kernel) {
    size_t at = ptx.find(".entry " + std::string(kernel.name) + "("), end = ptx.find(')', at);
    size_t count = 0;
    for (at = ptx.find(".param ", at); at < end; at = ptx.find(".param ", at + 1), ++count) {
        // .u64, .b32, .f32: bits are the digits
        unsigned bits = std::strtoul(ptx.c_str() + at + std::strlen(".param .u"), nullptr, 10);
        if (count >= kernel.param_count || bits / 8 != kernel.param_bytes[count]) return false;
    }
    return count == kernel.param_count;
}

static CUresult load(const char* name, CUmodule* handle, const void* image) {
    Call call(name, "module", Needs::Context);
    if (call.refused) return call.refused;
    if (!image) return CUDA_ERROR_INVALID_VALUE;
    std::string ptx(static_cast<const char*>(image));
    int version = directive(ptx, ".version "), target = directive(ptx, ".target sm_");
    if (version < 0 || target < 0) return call.wrong(CUDA_ERROR_INVALID_IMAGE, "the image is no PTX");
    if (version > ptx_version_max(settings().driver_version)) {
        return call.wrong(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "PTX %d.%d is too new", version / 10, version % 10);
    }
    if (target > 90) return call.wrong(CUDA_ERROR_INVALID_PTX, "PTX for sm_%d, on sm_90", target);
    auto module = std::make_shared<Module>(Module{call.context, entries_of(ptx)});
    if (module->entries.empty()) return call.wrong(CUDA_ERROR_INVALID_PTX, "the PTX has no entry");
    for (const auto& [entry, threads] : module->entries) {
        const Kernel* kernel = kernel_named(entry);
        if (!kernel) return call.wrong(CUDA_ERROR_INVALID_PTX, "kernel %s is in no .cu file", entry.c_str());
        if (!same_params(ptx, *kernel)) {
            return call.wrong(CUDA_ERROR_INVALID_PTX, "kernel %s has other parameters in its .cu file", entry.c_str());
        }
    }
    *handle = reinterpret_cast<CUmodule>(state().modules.add(module));
    return CUDA_SUCCESS;
}

API cuModuleLoadData(CUmodule* handle, const void* image) { return load("cuModuleLoadData", handle, image); }
// No option changes anything here.
API cuModuleLoadDataEx(CUmodule* handle, const void* image, unsigned, void*, void**) {
    return load("cuModuleLoadDataEx", handle, image);
}

static std::shared_ptr<Module> module_of(Call& call, CUmodule handle) {
    std::shared_ptr<Module> module = state().modules.find(handle);
    if (!module) call.refused = call.wrong(CUDA_ERROR_INVALID_HANDLE, "no module is %p", static_cast<void*>(handle));
    return module;
}

API cuModuleUnload(CUmodule handle) {
    Call call("cuModuleUnload", "module", Needs::AnyContext);
    if (call.refused) return call.refused;
    if (!module_of(call, handle)) return call.refused;
    state().modules.remove(handle);
    state().functions.remove_if([&](const Function& f) { return f.module == reinterpret_cast<uint64_t>(handle); });
    return call.context->lost;
}

API cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    Call call("cuModuleGetFunction", "module", Needs::Context);
    if (call.refused) return call.refused;
    std::shared_ptr<Module> module = module_of(call, handle);
    if (!module) return call.refused;
    auto entry = module->entries.find(name);
    if (entry == module->entries.end()) return CUDA_ERROR_NOT_FOUND;
    auto found = std::make_shared<Function>(
        Function{module->context, kernel_named(name), entry->second, reinterpret_cast<uint64_t>(handle)});
    *function = reinterpret_cast<CUfunction>(state().functions.add(found));
    return CUDA_SUCCESS;
}

// A kernel may be loaded when it is first launched or, so asked, before: here it always is.
API cuFuncLoad(CUfunction handle) {
    Call call("cuFuncLoad", "module", Needs::Context);
    if (call.refused) return call.refused;
    if (state().functions.find(handle)) return CUDA_SUCCESS;
    return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no function is %p", static_cast<void*>(handle));
}

API cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
    Call call("cuFuncGetAttribute", "module", Needs::Context);
    if (call.refused) return call.refused;
    std::shared_ptr<Function> function = state().functions.find(handle);
    if (!function) return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no function is %p", static_cast<void*>(handle));
    // MAX_THREADS_PER_BLOCK
    *value = attribute == 0 ? (function->threads_max ? function->threads_max : 1024) : 0;
    return CUDA_SUCCESS;
}

// ---- launches -------------------------------------------------------------------------------------------------------

// A launch with parameters of its own: those of the program may change as soon as the call returns.
struct Queued {
    const Kernel* kernel;
    unsigned blocks, threads;
    std::vector<uint64_t> values;
    std::vector<void*> params;
    uint32_t visible;
};

struct Running {
    Launch launch;
    Ran ran;
};

static void run_launch(void* data) {
    Running& running = *static_cast<Running*>(data);
    running.ran = run(running.launch);
}

static CUresult error_of(const Fault& fault, const char* kernel) {
    switch (fault.signal) {
    // a trap of the compiler's, on one processor and another
    case SIGILL:
    case SIGTRAP:
        report("kernel %s: an access that is not aligned", kernel);
        return CUDA_ERROR_MISALIGNED_ADDRESS;
    case SIGFPE:
        report("kernel %s: a division by zero", kernel);
        return CUDA_ERROR_LAUNCH_FAILED;
    default:
        report("kernel %s: no access to %p", kernel, fault.address);
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
}

static CUresult run_queued(Queued& queued, Random& random) {
    int64_t start = now_ns();
    bool backwards = settings().seed != 0 && random.below(2) == 1;
    Running running = {{queued.kernel, queued.blocks, queued.threads, queued.params.data(), backwards}, {}};
    Fault fault;
    bool ended;
    {
        Access access(queued.visible);
        ended = runs_to_its_end(run_launch, &running, &fault);
    }
    if (!ended) {
        abandon_run();
        return error_of(fault, queued.kernel->name);
    }
    if (running.ran.diverged) {
        report("kernel %s: threads ended while others of their block waited for them", queued.kernel->name);
        return CUDA_ERROR_LAUNCH_FAILED;
    }
    take_the_time(start);
    return CUDA_SUCCESS;
}

// What a kernel is given as an address of host memory that no device sees would work here, and nowhere else.
static bool is_visible(const Memory& memory, uint64_t address, std::vector<std::shared_ptr<HostRange>>* pinned) {
    // null, and what stands for the address of nothing
    constexpr uint64_t LOWEST = 1 << 16;
    if (address < LOWEST || memory.is_device_address(address)) return true;
    auto range = memory.host_range(address, 1);
    if (range) pinned->push_back(range);
    // one past the end, of pinned memory or of another process's
    return range || memory.host_range(address - 1, 1) || memory.is_opened(address);
}

API cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream_handle, void** params,
                   void** extra) {
    Call call = Call::queueing("cuLaunchKernel", "launch");
    if (call.refused) return call.refused;
    std::shared_ptr<Function> function = state().functions.find(handle);
    if (!function) return call.wrong(CUDA_ERROR_INVALID_HANDLE, "no function is %p", static_cast<void*>(handle));
    std::shared_ptr<Stream> stream = call.stream(stream_handle);
    if (!stream) return call.refused;
    const Kernel& kernel = *function->kernel;
    if (stream->context != function->context || stream->context != call.context) {
        return call.wrong(CUDA_ERROR_INVALID_HANDLE, "%s is of device %d, the stream of device %d, and current is %d",
                          kernel.name, function->context->device, stream->context->device, call.context->device);
    }
    unsigned threads_max = function->threads_max ? function->threads_max : 1024;
    if (grid_x == 0 || block_x == 0 || block_x > threads_max) {
        return call.wrong(CUDA_ERROR_INVALID_VALUE, "%s with %u blocks of %u threads", kernel.name, grid_x, block_x);
    }
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes != 0 || extra) {
        return call.wrong(CUDA_ERROR_NOT_SUPPORTED,
                          "%s: emulated are grids along x, without dynamic shared memory, with parameters one by one",
                          kernel.name);
    }
    if (!params) return CUDA_ERROR_INVALID_VALUE;
    auto queued = std::make_shared<Queued>();
    *queued = {&kernel, grid_x, block_x, std::vector<uint64_t>(kernel.param_count), {}, function->context->visible};
    Operation operation;
    operation.kind = "kernel";
    operation.name = kernel.name;
    operation.injected = call.injected;
    for (size_t i = 0; i < kernel.param_count; ++i) {
        std::memcpy(&queued->values[i], params[i], kernel.param_bytes[i]);
        queued->params.push_back(&queued->values[i]);
        if (kernel.param_is_address[i] && !is_visible(state().memory, queued->values[i], &operation.host_ranges)) {
            report("%s: parameter %zu is %#" PRIx64 ", which no device sees", kernel.name, i, queued->values[i]);
            operation.injected = CUDA_ERROR_ILLEGAL_ADDRESS;
        }
    }
    operation.run = [queued](Random& random) { return run_queued(*queued, random); };
    enqueue(call.lock, stream, std::move(operation));
    return CUDA_SUCCESS;
}

// For tests of the kernels themselves: a launch on host memory, on the caller's thread. −1: there is no such kernel.
API emulate_kernel(const char* name, unsigned blocks, unsigned threads, int backwards, void** params,
                   int* synchronised) {
    const Kernel* kernel = kernel_named(name);
    if (!kernel) return -1;
    Ran ran = run({kernel, blocks, threads, params, backwards != 0});
    *synchronised = ran.synchronised;
    return ran.diverged ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
