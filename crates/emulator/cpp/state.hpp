// All that the emulated driver knows, behind one lock: devices with their contexts, memory, streams, handles.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "abi.hpp"
#include "kernel.hpp"
#include "memory.hpp"
#include "settings.hpp"
#include "stream.hpp"

namespace emulator {

using Lock = std::unique_lock<std::mutex>;

// A device and its primary context, the only one it can have.
struct Context {
    int device;
    int physical;
    Arena arena;
    // retained this often; 0: there is no context
    unsigned retained = 0;
    // it is being destroyed: a new one has to wait
    bool ending = false;
    // one more for each time it was destroyed: handles of before are stale
    unsigned generation = 0;
    // an operation has failed: no more begin, and once those that use host memory have ended, it is lost
    bool failing = false;
    // what ended it
    CUresult lost = CUDA_SUCCESS;
    // devices whose memory its kernels may touch, as bits; itself included
    uint32_t visible = 0;
    std::shared_ptr<Stream> null_stream;
    // all that have work or may get it, the null stream included
    std::vector<std::shared_ptr<Stream>> streams;
    unsigned streams_made = 0;
    uint64_t used_bytes = 0;
};

struct Module {
    Context* context;
    // names of its entries, with the most threads of a block or 0 where nothing is said
    std::map<std::string, unsigned> entries;
};

struct Function {
    Context* context;
    const Kernel* kernel;
    unsigned threads_max;
    uint64_t module;
};

struct Event {
    Context* context;
    unsigned flags;
    // the last one; null: never recorded
    std::shared_ptr<Recording> recording;
};

// Handles are no addresses and are never used again: a stale one is noticed, a dereferenced one ends the process.
template <class Thing> class Handles {
  public:
    explicit Handles(uint64_t kind) : kind_(kind) {}
    uint64_t add(std::shared_ptr<Thing> thing) {
        uint64_t handle = 0x5e00'0000'0000'0000 | kind_ << 48 | ++made_ << 4;
        all_.emplace(handle, std::move(thing));
        return handle;
    }
    std::shared_ptr<Thing> find(const void* handle) const {
        auto at = all_.find(reinterpret_cast<uint64_t>(handle));
        return at == all_.end() ? nullptr : at->second;
    }
    bool remove(const void* handle) { return all_.erase(reinterpret_cast<uint64_t>(handle)) == 1; }
    template <class Condition> void remove_if(Condition condition) {
        for (auto at = all_.begin(); at != all_.end();) at = condition(*at->second) ? all_.erase(at) : std::next(at);
    }

  private:
    uint64_t kind_, made_ = 0;
    std::unordered_map<uint64_t, std::shared_ptr<Thing>> all_;
};

struct State {
    std::mutex mutex;
    // an operation has ended, a thread of the program begins to wait
    std::condition_variable progress;
    // what threads of the program wait for
    std::vector<const std::vector<Point>*> awaited;
    bool initialised = false;
    std::atomic<bool> forked{false};
    std::vector<std::unique_ptr<Context>> contexts;
    Memory memory;
    Handles<Stream> streams{1};
    Handles<Event> events{2};
    Handles<Module> modules{3};
    Handles<Function> functions{4};
};

// Never destroyed: streams run until the process ends.
State& state();

// The handle of a context as it is now.
CUcontext handle_of(const Context& context);
// The context that a handle names, or null; sets `destroyed` for a stale one.
Context* context_of(CUcontext handle, bool* destroyed = nullptr);

// Ends a context once its work has: its memory, streams, events and modules are gone.
void destroy(Lock& lock, Context& context);

} // namespace emulator
