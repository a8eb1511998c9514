#include "bootstrap.hpp"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/random.h>
#include <unistd.h>

#include "../cpp/settings.hpp"
#include "faults.hpp"
#include "threads.hpp"

using emulator::die;
using emulator::report;

namespace emulated_nccl {

// ---- the identifier and its thread ----------------------------------------------------------------------------------

// A rank is lost while it joins: the others wait for ever. Source: bootstrapRoot in bootstrap.cc, 2.27.7.
static void introduce(const File& listening) {
    // nobody tells it to stop: it is a thread of the process that made the identifier, for as long as that lives
    const Stop never;
    std::vector<File> ranks;
    std::vector<Hello> hellos;
    size_t come = 0;
    do {
        File connection;
        Hello hello;
        if (accept_from(listening, never, &connection) != Outcome::Done) return;
        if (receive_all(connection, &hello, sizeof hello, never) != Outcome::Done) continue;
        if (ranks.empty()) {
            ranks.resize(static_cast<size_t>(hello.size));
            hellos.resize(ranks.size());
        }
        if (static_cast<size_t>(hello.size) != ranks.size()) {
            report("NCCL: rank %d says there are %d ranks, another one %zu", hello.rank, hello.size, ranks.size());
            return;
        }
        size_t rank = static_cast<size_t>(hello.rank);
        if (ranks[rank]) {
            report("NCCL: rank %d of %d joins a second time", hello.rank, hello.size);
            return;
        }
        ranks[rank] = std::move(connection);
        hellos[rank] = hello;
        ++come;
    } while (come < ranks.size());
    for (const File& rank : ranks) send_all(rank, hellos.data(), hellos.size() * sizeof hellos[0], never);
}

constexpr char PREFIX[] = "emulated-nccl-";

ncclUniqueId new_id() {
    unsigned char random[16];
    if (getrandom(random, sizeof random, 0) != static_cast<ssize_t>(sizeof random)) {
        die("NCCL: no random numbers: %s", std::strerror(errno));
    }
    ncclUniqueId id = {};
    std::memcpy(id.internal, PREFIX, sizeof PREFIX - 1);
    for (size_t i = 0; i < sizeof random; ++i) {
        std::snprintf(id.internal + sizeof PREFIX - 1 + 2 * i, 3, "%02x", random[i]);
    }
    File listening = listen_at(id.internal);
    if (!listening) die("NCCL: the name %s is taken", id.internal);
    auto* kept = new File(std::move(listening));
    start_thread([kept] {
        introduce(*kept);
        delete kept;
    }).detach();
    return id;
}

// ---- joining --------------------------------------------------------------------------------------------------------

uint64_t host_hash() {
    char name[256] = {};
    const char* id = std::getenv("NCCL_HOSTID");
    if (id && *id) {
        std::snprintf(name, sizeof name, "%s", id);
    } else if (gethostname(name, sizeof name - 1) != 0) {
        die("NCCL: no host name: %s", std::strerror(errno));
    }
    uint64_t hash = 0xcbf29ce484222325;
    for (const char* c = name; *c; ++c) hash = (hash ^ static_cast<unsigned char>(*c)) * 0x100000001b3;
    return hash;
}

// Only the ranks that share a GPU notice; the others wait for them. Source: initTransportsRank in init.cc, 2.27.7.
static ncclResult_t check(const Hello& self, const std::vector<Hello>& all) {
    for (const Hello& other : all) {
        bool same = std::memcmp(&other.device, &self.device, sizeof self.device) == 0;
        if (other.rank == self.rank || !same || other.host_hash != self.host_hash) continue;
        unsigned device;
        std::memcpy(&device, self.device.bytes, sizeof device);
        return warn(ncclInvalidUsage, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %x", self.rank,
                    other.rank, device);
    }
    return ncclSuccess;
}

// Who connects, and what for.
struct Greeting {
    int rank;
    int for_data;
};

// Lower ranks listen to higher ones.
static Outcome connect_all(const std::string& name, const File& listening, const Hello& self, const Stop& stop,
                           Mesh* mesh) {
    mesh->data.resize(static_cast<size_t>(self.size));
    mesh->control.resize(static_cast<size_t>(self.size));
    for (int rank = 0; rank < self.rank; ++rank) {
        for (int for_data : {0, 1}) {
            File connection;
            Outcome outcome = connect_to(name + "-" + std::to_string(rank), stop, &connection);
            Greeting greeting = {self.rank, for_data};
            if (outcome == Outcome::Done) outcome = send_all(connection, &greeting, sizeof greeting, stop);
            if (outcome != Outcome::Done) return outcome;
            (for_data ? mesh->data : mesh->control)[static_cast<size_t>(rank)] = std::move(connection);
        }
    }
    for (int left = 2 * (self.size - 1 - self.rank); left > 0; --left) {
        File connection;
        Greeting greeting;
        Outcome outcome = accept_from(listening, stop, &connection);
        if (outcome == Outcome::Done) outcome = receive_all(connection, &greeting, sizeof greeting, stop);
        if (outcome != Outcome::Done) return outcome;
        (greeting.for_data ? mesh->data : mesh->control)[static_cast<size_t>(greeting.rank)] = std::move(connection);
    }
    return Outcome::Done;
}

static ncclResult_t result_of(Outcome outcome, const Stop& stop) {
    if (outcome == Outcome::Done) return ncclSuccess;
    if (outcome == Outcome::Lost && lost_rank_is_error()) return warn(ncclRemoteError, "a rank is lost while it joins");
    wait_stop(stop);
    return ncclInProgress;
}

ncclResult_t join(const ncclUniqueId& id, const Hello& self, const Stop& stop, Mesh* mesh) {
    std::string name(id.internal, strnlen(id.internal, sizeof id.internal));
    if (name.compare(0, sizeof PREFIX - 1, PREFIX) != 0) {
        return warn(ncclInvalidArgument, "this identifier was not made by ncclGetUniqueId");
    }
    // before anybody can be told about this rank
    File listening = listen_at(name + "-" + std::to_string(self.rank));
    if (!listening) report("NCCL: rank %d of %d joins a second time", self.rank, self.size);
    File root;
    Outcome outcome = connect_to(name, stop, &root);
    if (outcome == Outcome::Done) outcome = send_all(root, &self, sizeof self, stop);
    std::vector<Hello> all(static_cast<size_t>(self.size));
    if (outcome == Outcome::Done) outcome = receive_all(root, all.data(), all.size() * sizeof all[0], stop);
    if (outcome != Outcome::Done) return result_of(outcome, stop);
    ncclResult_t checked = check(self, all);
    if (checked != ncclSuccess) return checked;
    return result_of(connect_all(name, listening, self, stop, mesh), stop);
}

} // namespace emulated_nccl
