// A communicator: its state, what is in progress, and what is on streams.
//
// What takes time is done by a thread of the communicator's, one thing at a time: joining; connecting to ranks that a
// group is the first with, and putting the group on its stream; finalizing. On the stream, a function of the host
// exchanges the bytes. Groups of a communicator run in the order they were started, whatever streams they are on.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "abi.hpp"
#include "bootstrap.hpp"
#include "exchange.hpp"

namespace emulated_nccl {

// Operations of one communicator that were started together.
struct Batch {
    CUstream stream = nullptr;
    std::vector<Operation> operations;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
  public:
    Communicator(const ncclUniqueId& id, const Hello& self, CUcontext context, CUdevice device, bool blocking);

    int rank() const { return self_.rank; }
    int size() const { return self_.size; }
    CUdevice device() const { return device_; }
    bool is_blocking() const { return blocking_; }

    // What is in progress, or has become of it.
    ncclResult_t state();
    // An error unless operations can be started now.
    ncclResult_t ensure_ready();
    // Ends all use of it.
    ncclResult_t fail(ncclResult_t code);

    // Each goes on in the thread, or is waited for where the communicator is blocking.
    ncclResult_t join();
    ncclResult_t start(Batch batch);
    ncclResult_t finalize();

    // Blocks until what is on streams has ended.
    void drain();
    // Ends everything, and waits until nothing of it touches memory any more.
    void abort();

  private:
    // what one rank tells another, a byte each
    enum Word : char { SENDS = 'S', RECEIVES = 'R', COLLECTIVE = 'C', FINALIZES = 'F' };

    struct Queued;

    const ncclUniqueId id_;
    const Hello self_;
    const CUcontext context_;
    const CUdevice device_;
    const bool blocking_;
    Stop stop_;
    // written by the thread while it joins
    Mesh mesh_;
    std::thread thread_;

    std::mutex mutex_;
    std::condition_variable changed_;
    ncclResult_t state_ = ncclSuccess;
    bool finalized_ = false;
    // groups that were started, and that have ended on their streams
    uint64_t started_ = 0, ended_ = 0;
    // functions on streams that are in an exchange
    unsigned running_ = 0;

    // of the thread: whom it has agreed with on what, and what was heard of whom and not yet taken
    std::set<std::pair<int, Word>> agreed_;
    std::map<std::pair<int, char>, unsigned> heard_;
    emulator::Random random_;

    template <class Work> ncclResult_t go_on(Work work);
    ncclResult_t put_on_stream(Batch batch, uint64_t number);
    ncclResult_t connect(const Batch& batch);
    Outcome agree(const std::map<int, std::set<std::pair<char, char>>>& words);
    Outcome hear(const std::set<std::pair<int, char>>& awaited);
    ncclResult_t lost();
    static void run_on_stream(void* data);
    void run(const Batch& batch, uint64_t number);
};

} // namespace emulated_nccl
