// The operations of one rank that are done together: bytes that move between ranks, through sockets.
//
// Between two ranks, in each direction, pieces follow each other in the order of the operations: collectives first,
// then what is sent and received. All directions of all ranks progress at the same time, so that nobody has to receive
// before the others can send. What does not fit together is told, and ends the process: a real NCCL would hang, or
// write where nobody expects it.
#pragma once

#include <vector>

#include "../cpp/settings.hpp"
#include "bootstrap.hpp"

namespace emulated_nccl {

enum class Kind : int { Send, Recv, Broadcast, AllGather };

struct Operation {
    Kind kind;
    const char* from;
    char* into;
    // that one rank sends to another
    size_t bytes;
    // the root, or the one that is sent to or received from
    int rank;

    bool is_collective() const { return kind == Kind::Broadcast || kind == Kind::AllGather; }
};

// Does all of it. Lost: a rank is gone that something was to be sent to or received from; all else is done.
Outcome exchange(const std::vector<Operation>& operations, int self, const Mesh& mesh, const Stop& stop,
                 emulator::Random& random);

} // namespace emulated_nccl
