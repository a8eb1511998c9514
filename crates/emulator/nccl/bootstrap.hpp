// How ranks find each other.
//
// An identifier names a socket of the process that made it. There, a thread waits for every rank to say who it is, and
// then tells all of them about all. Then each two ranks connect, once for data and once for all else. As with NCCL,
// that process has to live until then, and a rank that does not come keeps the others waiting until they are told to
// stop.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.hpp"
#include "sockets.hpp"

namespace emulated_nccl {

// What a rank tells about itself.
struct Hello {
    int rank;
    int size;
    uint64_t host_hash;
    CUuuid device;
};

// The connections of one rank, by rank; none to itself.
struct Mesh {
    std::vector<File> data, control;
};

// A new identifier, whose thread waits from now on.
ncclUniqueId new_id();

// Joins: success once all ranks have, an error, or ncclInProgress where it was told to stop.
ncclResult_t join(const ncclUniqueId& id, const Hello& self, const Stop& stop, Mesh* mesh);

// Ranks with the same one are on the same host, as NCCL sees it: NCCL_HOSTID, or else the host's name.
uint64_t host_hash();

} // namespace emulated_nccl
