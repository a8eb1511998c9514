// The emulated NCCL's interface.
//
// A handle of a communicator is an address that stays taken: one that is used after its end is noticed. So is a thread
// that uses a communicator while another one does, which NCCL leaves undefined.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../cpp/settings.hpp"
#include "communicator.hpp"
#include "driver.hpp"
#include "faults.hpp"

using emulator::die;
using namespace emulated_nccl;

struct ncclComm {
    std::shared_ptr<Communicator> communicator;
    std::atomic<int> inside{0};
};

namespace {

// The group of this thread.
struct Group {
    unsigned depth = 0;
    ncclResult_t error = ncclSuccess;
    // in the order they were first used
    std::vector<std::pair<std::shared_ptr<Communicator>, Batch>> batches;
};
thread_local Group group;

// A call with a communicator.
class Call {
  public:
    Call(ncclComm_t comm, const char* name) : comm_(comm), name_(name) {
        if (!comm) return;
        if (comm->inside.fetch_add(1) != 0) die("NCCL: %s while another thread uses the communicator", name);
        if (!comm->communicator) die("NCCL: %s with a communicator that was destroyed or aborted", name);
    }
    ~Call() {
        if (comm_) comm_->inside.fetch_sub(1);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // An error, or nothing yet.
    ncclResult_t check() {
        if (!comm_) return warn(ncclInvalidArgument, "%s : comm argument is NULL", name_);
        return injected(name_);
    }
    const std::shared_ptr<Communicator>& operator->() { return comm_->communicator; }
    const std::shared_ptr<Communicator>& communicator() { return comm_->communicator; }

  private:
    ncclComm_t comm_;
    const char* name_;
};

// ncclInt8 … ncclBfloat16, as numbered in nccl.h.
constexpr size_t TYPE_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

ncclResult_t ask(ncclComm_t comm, const char* name, int* value, int (*question)(const Communicator&)) {
    Call call(comm, name);
    if (ncclResult_t error = call.check()) return error;
    if (ncclResult_t error = call->ensure_ready()) return error;
    *value = question(*call.communicator());
    return ncclSuccess;
}

// ---- groups ---------------------------------------------------------------------------------------------------------

ncclResult_t end_group() {
    Group ended = std::move(group);
    group = Group();
    if (ended.error != ncclSuccess) return ended.error;
    ncclResult_t result = ncclSuccess;
    for (auto& [communicator, batch] : ended.batches) {
        ncclResult_t started = communicator->start(std::move(batch));
        if (result == ncclSuccess || result == ncclInProgress) result = started == ncclSuccess ? result : started;
    }
    // one that is not blocking only begins here
    bool waits = std::any_of(ended.batches.begin(), ended.batches.end(),
                             [](const auto& one) { return !one.first->is_blocking(); });
    return result == ncclSuccess && waits ? ncclInProgress : result;
}

// Bytes that a stream cannot reach are noticed where they are handed over.
ncclResult_t check_memory(const char* name, const void* memory, size_t bytes) {
    if (!memory) return warn(ncclInvalidArgument, "%s : a buffer is NULL", name);
    CUdeviceptr base, address = reinterpret_cast<CUdeviceptr>(memory);
    size_t length;
    bool held = driver()->address_range(&base, &length, address) == 0 && bytes <= length - (address - base);
    if (!held) {
        die("NCCL: %s with %zu bytes at %p, which are not of one allocation", name, bytes, memory);
    }
    return ncclSuccess;
}

ncclResult_t check_operation(Call& call, const char* name, const Operation& operation, size_t into_bytes) {
    if (ncclResult_t error = call.check()) return error;
    if (ncclResult_t error = call->ensure_ready()) return error;
    if (operation.rank < 0 || operation.rank >= call->size()) {
        return warn(ncclInvalidArgument, "%s : invalid rank %d of %d", name, operation.rank, call->size());
    }
    if (operation.bytes == 0) return ncclSuccess;
    bool receives_only =
        operation.kind == Kind::Recv || (operation.kind == Kind::Broadcast && operation.rank != call->rank());
    if (!receives_only) {
        if (ncclResult_t error = check_memory(name, operation.from, operation.bytes)) return error;
    }
    return operation.kind == Kind::Send ? ncclSuccess : check_memory(name, operation.into, into_bytes);
}

ncclResult_t add(ncclComm_t comm, const char* name, Operation operation, size_t type, CUstream stream) {
    if (type >= sizeof TYPE_BYTES / sizeof TYPE_BYTES[0]) {
        return warn(ncclInvalidArgument, "%s : invalid type %zu", name, type);
    }
    Call call(comm, name);
    operation.bytes *= TYPE_BYTES[type];
    size_t parts = comm && operation.kind == Kind::AllGather ? static_cast<size_t>(call->size()) : 1;
    if (ncclResult_t error = check_operation(call, name, operation, parts * operation.bytes)) {
        // it is the group that fails, and the communicator with it
        group.error = error;
        return comm ? call->fail(error) : error;
    }
    // as NCCL does, for collectives only
    if (operation.bytes == 0 && operation.is_collective()) return ncclSuccess;
    auto at = std::find_if(group.batches.begin(), group.batches.end(),
                           [&](const auto& one) { return one.first == call.communicator(); });
    if (at == group.batches.end()) {
        at = group.batches.insert(at, {call.communicator(), Batch{stream, {}}});
    }
    if (at->second.stream != stream) die("NCCL: a group with two streams is not emulated");
    at->second.operations.push_back(operation);
    return ncclSuccess;
}

// Outside a group, one operation is a group.
ncclResult_t operate(ncclComm_t comm, const char* name, const Operation& operation, int type, CUstream stream) {
    ++group.depth;
    ncclResult_t added = add(comm, name, operation, static_cast<size_t>(type), stream);
    if (--group.depth > 0) return added;
    ncclResult_t ended = end_group();
    return added == ncclSuccess ? ended : added;
}

// ---- joining --------------------------------------------------------------------------------------------------------

ncclResult_t parse(const ncclConfig_t* config, bool* blocking) {
    *blocking = true;
    if (!config) return ncclSuccess;
    ncclConfig_t known = {sizeof known,  MAGIC,         0,       UNDEFINED_INT, UNDEFINED_INT,
                          UNDEFINED_INT, UNDEFINED_INT, nullptr, UNDEFINED_INT};
    std::memcpy(&known, config, std::min(config->size, sizeof known));
    if (known.magic != MAGIC) {
        return warn(ncclInvalidArgument, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
    }
    if (known.blocking != UNDEFINED_INT && known.blocking != 0 && known.blocking != 1) {
        return warn(ncclInvalidArgument, "Invalid config blocking attribute value %d", known.blocking);
    }
    if ((known.minCTAs != UNDEFINED_INT && known.minCTAs <= 0) ||
        (known.maxCTAs != UNDEFINED_INT && known.maxCTAs <= 0) || known.minCTAs > known.maxCTAs) {
        return warn(ncclInvalidArgument, "Invalid config min/max channels attribute value %d/%d", known.minCTAs,
                    known.maxCTAs);
    }
    *blocking = known.blocking != 0;
    return ncclSuccess;
}

// The device that is current on this thread. A real NCCL would take the first one where none is.
ncclResult_t current(CUcontext* context, CUdevice* device, CUuuid* uuid) {
    if (!driver()) {
        return warn(ncclUnhandledCudaError,
                    "Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'");
    }
    if (driver()->current(context) || !*context) {
        return warn(ncclUnhandledCudaError, "Cuda failure: no context is current on the thread that joins");
    }
    if (driver()->device(device) || driver()->uuid(uuid, *device)) {
        return warn(ncclUnhandledCudaError, "Cuda failure: the current context has no device");
    }
    return ncclSuccess;
}

// Ends the handle; the communicator lives until nothing on a stream names it any more.
std::shared_ptr<Communicator> take(ncclComm_t comm) { return std::move(comm->communicator); }

} // namespace

// ---- the library ----------------------------------------------------------------------------------------------------

NCCL_API(ncclResult_t) ncclGetVersion(int* version) {
    if (!version) return ncclInvalidArgument;
    *version = VERSION;
    return ncclSuccess;
}

NCCL_API(const char*) ncclGetErrorString(ncclResult_t code) { return text_of(code); }

NCCL_API(const char*) ncclGetLastError(ncclComm_t) { return last_error(); }

NCCL_API(ncclResult_t) ncclGetUniqueId(ncclUniqueId* id) {
    if (!id) return ncclInvalidArgument;
    if (ncclResult_t error = injected("ncclGetUniqueId")) return error;
    *id = new_id();
    return ncclSuccess;
}

// ---- communicators --------------------------------------------------------------------------------------------------

NCCL_API(ncclResult_t)
ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
    if (!comm) return ncclInvalidArgument;
    *comm = nullptr;
    if (group.depth > 0) die("NCCL: joining in a group is not emulated");
    if (ncclResult_t error = injected("ncclCommInitRankConfig")) return error;
    CUcontext context = nullptr;
    CUdevice device = 0;
    Hello self = {rank, size, host_hash(), {}};
    if (ncclResult_t error = current(&context, &device, &self.device)) return error;
    if (size < 1 || rank < 0 || rank >= size) {
        return warn(ncclInvalidArgument, "Invalid rank requested : %d/%d", rank, size);
    }
    bool blocking;
    if (ncclResult_t error = parse(config, &blocking)) return error;
    *comm = new ncclComm{std::make_shared<Communicator>(id, self, context, device, blocking)};
    return (*comm)->communicator->join();
}

NCCL_API(ncclResult_t) ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
    Call call(comm, "ncclCommGetAsyncError");
    if (ncclResult_t error = call.check()) return error;
    *state = call->state();
    return ncclSuccess;
}

NCCL_API(ncclResult_t) ncclCommCount(ncclComm_t comm, int* count) {
    return ask(comm, "ncclCommCount", count, [](const Communicator& one) { return one.size(); });
}

NCCL_API(ncclResult_t) ncclCommUserRank(ncclComm_t comm, int* rank) {
    return ask(comm, "ncclCommUserRank", rank, [](const Communicator& one) { return one.rank(); });
}

NCCL_API(ncclResult_t) ncclCommCuDevice(ncclComm_t comm, int* device) {
    return ask(comm, "ncclCommCuDevice", device, [](const Communicator& one) { return one.device(); });
}

NCCL_API(ncclResult_t) ncclCommFinalize(ncclComm_t comm) {
    Call call(comm, "ncclCommFinalize");
    if (ncclResult_t error = call.check()) return error;
    if (ncclResult_t error = call->ensure_ready()) return error;
    return call->finalize();
}

NCCL_API(ncclResult_t) ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    Call call(comm, "ncclCommDestroy");
    if (ncclResult_t error = injected("ncclCommDestroy")) return error;
    if (call->state() == ncclInProgress) die("NCCL: ncclCommDestroy while something is in progress");
    auto communicator = take(comm);
    communicator->drain();
    communicator->abort();
    return ncclSuccess;
}

NCCL_API(ncclResult_t) ncclCommAbort(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    Call call(comm, "ncclCommAbort");
    if (ncclResult_t error = injected("ncclCommAbort")) return error;
    auto communicator = take(comm);
    communicator->abort();
    return ncclSuccess;
}

// ---- operations -----------------------------------------------------------------------------------------------------

NCCL_API(ncclResult_t) ncclGroupStart() {
    if (ncclResult_t error = injected("ncclGroupStart")) return error;
    ++group.depth;
    return ncclSuccess;
}

NCCL_API(ncclResult_t) ncclGroupEnd() {
    if (group.depth == 0) return warn(ncclInvalidUsage, "ncclGroupEnd: not in a group call.");
    if (ncclResult_t error = injected("ncclGroupEnd")) group.error = error;
    return --group.depth > 0 ? ncclSuccess : end_group();
}

NCCL_API(ncclResult_t)
ncclSend(const void* from, size_t count, int type, int to, ncclComm_t comm, CUstream stream) {
    return operate(comm, "ncclSend", {Kind::Send, static_cast<const char*>(from), nullptr, count, to}, type, stream);
}

NCCL_API(ncclResult_t) ncclRecv(void* into, size_t count, int type, int from, ncclComm_t comm, CUstream stream) {
    return operate(comm, "ncclRecv", {Kind::Recv, nullptr, static_cast<char*>(into), count, from}, type, stream);
}

NCCL_API(ncclResult_t)
ncclBroadcast(const void* from, void* into, size_t count, int type, int root, ncclComm_t comm, CUstream stream) {
    Operation operation = {Kind::Broadcast, static_cast<const char*>(from), static_cast<char*>(into), count, root};
    return operate(comm, "ncclBroadcast", operation, type, stream);
}

NCCL_API(ncclResult_t)
ncclAllGather(const void* from, void* into, size_t count, int type, ncclComm_t comm, CUstream stream) {
    Operation operation = {Kind::AllGather, static_cast<const char*>(from), static_cast<char*>(into), count, 0};
    return operate(comm, "ncclAllGather", operation, type, stream);
}
