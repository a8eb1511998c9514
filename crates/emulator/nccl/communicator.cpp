#include "communicator.hpp"

#include <cerrno>
#include <cstring>
#include <sys/socket.h>

#include "../cpp/settings.hpp"
#include "driver.hpp"
#include "faults.hpp"
#include "threads.hpp"

using emulator::die;
using emulator::Random;
using Lock = std::unique_lock<std::mutex>;

namespace emulated_nccl {

static uint64_t seed_of(int rank, uint64_t number) {
    return emulator::settings().seed * 0x9e3779b97f4a7c15 + (static_cast<uint64_t>(rank) << 32) + number + 1;
}

Communicator::Communicator(const ncclUniqueId& id, const Hello& self, CUcontext context, CUdevice device, bool blocking)
    : id_(id), self_(self), context_(context), device_(device), blocking_(blocking), random_(seed_of(self.rank, 0)) {}

// ---- state ----------------------------------------------------------------------------------------------------------

ncclResult_t Communicator::state() {
    Lock lock(mutex_);
    return state_;
}

ncclResult_t Communicator::ensure_ready() {
    Lock lock(mutex_);
    if (state_ == ncclInProgress) {
        return warn(ncclInvalidArgument,
                    "Attempt to use communicator before the previous operation returned ncclSuccess");
    }
    if (state_ == ncclSuccess && finalized_) {
        return warn(ncclInvalidUsage, "Attempt to use communicator after ncclCommFinalize");
    }
    return state_;
}

ncclResult_t Communicator::fail(ncclResult_t code) {
    Lock lock(mutex_);
    changed_.notify_all();
    return state_ = code;
}

// Does it in the thread, which has nothing else to do: the state was ready.
template <class Work> ncclResult_t Communicator::go_on(Work work) {
    {
        Lock lock(mutex_);
        state_ = ncclInProgress;
    }
    if (thread_.joinable()) thread_.join();
    thread_ = start_thread([this, work]() mutable {
        emulator::delay(random_);
        ncclResult_t result = work();
        Lock lock(mutex_);
        // what is on a stream already may have failed meanwhile
        if (state_ == ncclInProgress) state_ = result;
        changed_.notify_all();
    });
    if (blocking_) thread_.join();
    return state();
}

// Of a wait for other ranks that has not ended well.
ncclResult_t Communicator::lost() {
    if (!stop_.told() && lost_rank_is_error()) return warn(ncclRemoteError, "a rank is lost");
    wait_stop(stop_);
    return ncclInProgress;
}

// ---- what the thread does -------------------------------------------------------------------------------------------

ncclResult_t Communicator::join() {
    return go_on([this] {
        return emulated_nccl::join(id_, self_, stop_, &mesh_);
    });
}

ncclResult_t Communicator::start(Batch batch) {
    uint64_t number;
    {
        Lock lock(mutex_);
        number = ++started_;
    }
    return go_on([this, batch, number]() mutable { return put_on_stream(std::move(batch), number); });
}

struct Communicator::Queued {
    std::shared_ptr<Communicator> communicator;
    Batch batch;
    uint64_t number;
};

ncclResult_t Communicator::put_on_stream(Batch batch, uint64_t number) {
    ncclResult_t connected = connect(batch);
    if (connected != ncclSuccess) return connected;
    emulator::delay(random_);
    if (CUresult result = driver()->make_current(context_)) {
        return warn(ncclUnhandledCudaError, "Cuda failure %d: the context is not there", result);
    }
    CUstream stream = batch.stream;
    uint64_t bytes = 0;
    for (const Operation& operation : batch.operations) bytes += operation.bytes;
    auto* queued = new Queued{shared_from_this(), std::move(batch), number};
    if (CUresult result = driver()->operate(stream, "nccl", bytes, run_on_stream, queued)) {
        delete queued;
        return warn(ncclUnhandledCudaError, "Cuda failure %d: nothing can be put on the stream", result);
    }
    return ncclSuccess;
}

// The first of its kind with a rank waits for that rank to start the same. Source: ncclP2PPreconnectFunc and
// ncclCollPreconnectFunc in group.cc, 2.27.7.
ncclResult_t Communicator::connect(const Batch& batch) {
    // by rank: what is said, and what has to be heard
    std::map<int, std::set<std::pair<char, char>>> words;
    auto add = [&](int rank, Word said, Word heard) {
        if (rank != self_.rank && agreed_.insert({rank, said}).second) words[rank].insert({said, heard});
    };
    for (const Operation& operation : batch.operations) {
        if (operation.is_collective()) {
            for (int rank = 0; rank < size(); ++rank) add(rank, COLLECTIVE, COLLECTIVE);
        } else if (operation.kind == Kind::Send) {
            add(operation.rank, SENDS, RECEIVES);
        } else {
            add(operation.rank, RECEIVES, SENDS);
        }
    }
    return agree(words) == Outcome::Done ? ncclSuccess : lost();
}

// Says all of it first, so that nobody waits for what another one says later.
Outcome Communicator::agree(const std::map<int, std::set<std::pair<char, char>>>& words) {
    std::set<std::pair<int, char>> awaited;
    for (const auto& [rank, pairs] : words) {
        for (auto [said, heard] : pairs) {
            Outcome outcome = send_all(mesh_.control[static_cast<size_t>(rank)], &said, 1, stop_);
            if (outcome != Outcome::Done) return outcome;
            awaited.insert({rank, heard});
        }
    }
    return hear(awaited);
}

Outcome Communicator::hear(const std::set<std::pair<int, char>>& awaited) {
    for (auto [rank, word] : awaited) {
        unsigned& heard = heard_[{rank, word}];
        while (heard == 0) {
            char other;
            Outcome outcome = receive_all(mesh_.control[static_cast<size_t>(rank)], &other, 1, stop_);
            if (outcome != Outcome::Done) return outcome;
            ++heard_[{rank, other}];
        }
        --heard;
    }
    return Outcome::Done;
}

ncclResult_t Communicator::finalize() {
    return go_on([this] {
        {
            Lock lock(mutex_);
            changed_.wait(lock, [this] { return ended_ == started_ || stop_.told() || state_ != ncclInProgress; });
            if (stop_.told() || state_ != ncclInProgress) return state_;
        }
        std::map<int, std::set<std::pair<char, char>>> words;
        for (int rank = 0; rank < size(); ++rank) {
            if (rank != self_.rank) words[rank].insert({FINALIZES, FINALIZES});
        }
        if (agree(words) != Outcome::Done) return lost();
        Lock lock(mutex_);
        finalized_ = true;
        return ncclSuccess;
    });
}

// ---- what is on streams ---------------------------------------------------------------------------------------------

void Communicator::run_on_stream(void* data) {
    std::unique_ptr<Queued> queued(static_cast<Queued*>(data));
    queued->communicator->run(queued->batch, queued->number);
}

void Communicator::run(const Batch& batch, uint64_t number) {
    {
        Lock lock(mutex_);
        changed_.wait(lock, [&] { return ended_ + 1 == number || stop_.told(); });
        if (stop_.told()) return;
        ++running_;
    }
    Random random(seed_of(rank(), number));
    Outcome outcome = exchange(batch.operations, rank(), mesh_, stop_, random);
    if (outcome == Outcome::Lost) {
        if (lost_rank_is_error()) fail(warn(ncclRemoteError, "a rank is lost"));
        wait_stop(stop_);
    }
    Lock lock(mutex_);
    --running_;
    if (outcome == Outcome::Done) ended_ = number;
    changed_.notify_all();
}

// ---- its end --------------------------------------------------------------------------------------------------------

void Communicator::drain() {
    if (thread_.joinable()) thread_.join();
    Lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ == started_ || state_ != ncclSuccess; });
}

void Communicator::abort() {
    {
        // whoever waits for a change either sees that it is told, or is waiting by then
        Lock lock(mutex_);
        stop_.tell();
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
    Lock lock(mutex_);
    changed_.wait(lock, [this] { return running_ == 0; });
}

} // namespace emulated_nccl
