#include "exchange.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <sys/socket.h>

using emulator::die;
using emulator::Random;

namespace emulated_nccl {

// Goes ahead of the bytes.
struct Header {
    uint64_t bytes;
    Kind kind;
    int root;

    bool operator==(const Header& other) const {
        return bytes == other.bytes && kind == other.kind && root == other.root;
    }
};

struct Piece {
    Header header;
    char* memory;
    size_t header_done = 0, done = 0;
};

// What is between this rank and another one.
struct Lane {
    std::deque<Piece> out, in;
    bool lost = false;
};

static const char* name_of(Kind kind) {
    switch (kind) {
    case Kind::Broadcast:
        return "broadcast";
    case Kind::AllGather:
        return "all-gather";
    default:
        return "send";
    }
}

// ---- operations to pieces -------------------------------------------------------------------------------------------

static void copy(char* into, const char* from, size_t bytes) {
    if (into != from) std::memmove(into, from, bytes);
}

static void add_collective(std::vector<Lane>& lanes, const Operation& operation, int self) {
    const Header header = {operation.bytes, operation.kind, operation.rank};
    char* from = const_cast<char*>(operation.from);
    for (int rank = 0; rank < static_cast<int>(lanes.size()); ++rank) {
        Lane& lane = lanes[static_cast<size_t>(rank)];
        if (operation.kind == Kind::AllGather) {
            char* part = operation.into + static_cast<size_t>(rank) * operation.bytes;
            if (rank == self) {
                copy(part, from, operation.bytes);
            } else {
                lane.out.push_back({header, from});
                lane.in.push_back({header, part});
            }
        } else if (operation.rank == self) {
            if (rank == self) copy(operation.into, from, operation.bytes);
            else lane.out.push_back({header, from});
        } else if (rank == operation.rank) {
            lane.in.push_back({header, operation.into});
        }
    }
}

static void add_point_to_point(std::vector<Lane>& lanes, const Operation& operation) {
    Lane& lane = lanes[static_cast<size_t>(operation.rank)];
    // what is sent is what is received
    const Header header = {operation.bytes, Kind::Send, 0};
    if (operation.kind == Kind::Send) lane.out.push_back({header, const_cast<char*>(operation.from)});
    else lane.in.push_back({header, operation.into});
}

static void check_sizes(const Header& sent, const Header& expected, int from, int self) {
    if (sent == expected) return;
    die("NCCL: rank %d sends rank %d %llu bytes (%s, root %d), which expects %llu (%s, root %d)", from, self,
        static_cast<unsigned long long>(sent.bytes), name_of(sent.kind), sent.root,
        static_cast<unsigned long long>(expected.bytes), name_of(expected.kind), expected.root);
}

// What a rank sends itself.
static void move_own(Lane& lane, int self) {
    if (lane.out.size() != lane.in.size()) {
        die("NCCL: rank %d sends itself %zu times and receives %zu times", self, lane.out.size(), lane.in.size());
    }
    for (size_t i = 0; i < lane.out.size(); ++i) {
        check_sizes(lane.out[i].header, lane.in[i].header, self, self);
        copy(lane.in[i].memory, lane.out[i].memory, lane.out[i].header.bytes);
    }
    lane.out.clear();
    lane.in.clear();
}

// ---- pieces through sockets -----------------------------------------------------------------------------------------

// More, none for now, or the other one is gone.
enum class Step { Moved, Blocked, Gone };

static Step step_of(ssize_t moved, size_t* done) {
    if (moved > 0) {
        *done += static_cast<size_t>(moved);
        return Step::Moved;
    }
    if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return Step::Blocked;
    if (moved < 0 && errno == EFAULT) die("NCCL: a buffer is no memory that its stream can reach");
    return Step::Gone;
}

static Step send_some(const File& connection, Piece& piece, size_t most) {
    if (piece.header_done < sizeof piece.header) {
        const char* at = reinterpret_cast<const char*>(&piece.header) + piece.header_done;
        size_t left = sizeof piece.header - piece.header_done;
        return step_of(send(connection.number(), at, left, MSG_NOSIGNAL), &piece.header_done);
    }
    size_t left = std::min(piece.header.bytes - piece.done, most);
    return step_of(send(connection.number(), piece.memory + piece.done, left, MSG_NOSIGNAL), &piece.done);
}

// The header that comes is kept in `coming` until it is whole.
static Step receive_some(const File& connection, Piece& piece, Header& coming, size_t most, int from, int self) {
    if (piece.header_done < sizeof coming) {
        char* at = reinterpret_cast<char*>(&coming) + piece.header_done;
        size_t left = sizeof coming - piece.header_done;
        Step step = step_of(recv(connection.number(), at, left, 0), &piece.header_done);
        if (piece.header_done == sizeof coming) check_sizes(coming, piece.header, from, self);
        return step;
    }
    size_t left = std::min(piece.header.bytes - piece.done, most);
    return step_of(recv(connection.number(), piece.memory + piece.done, left, 0), &piece.done);
}

static bool is_done(const Piece& piece) {
    return piece.header_done == sizeof piece.header && piece.done == piece.header.bytes;
}

// A turn of one direction: some bytes, not all there may be, so that others get their turns.
template <class Some> static void turn(std::deque<Piece>& pieces, bool* lost, Some some) {
    for (int i = 0; i < 8 && !pieces.empty(); ++i) {
        Step step = some(pieces.front());
        if (step == Step::Gone) *lost = true;
        if (step != Step::Moved) return;
        if (is_done(pieces.front())) pieces.pop_front();
    }
}

Outcome exchange(const std::vector<Operation>& operations, int self, const Mesh& mesh, const Stop& stop,
                 Random& random) {
    std::vector<Lane> lanes(mesh.data.size());
    std::vector<Header> coming(lanes.size());
    for (const Operation& operation : operations) {
        if (operation.is_collective()) add_collective(lanes, operation, self);
    }
    for (const Operation& operation : operations) {
        if (!operation.is_collective()) add_point_to_point(lanes, operation);
    }
    move_own(lanes[static_cast<size_t>(self)], self);
    for (;;) {
        bool lost = false, waits = false;
        std::vector<pollfd> files;
        for (size_t rank = 0; rank < lanes.size(); ++rank) {
            const Lane& lane = lanes[rank];
            bool out = !lane.out.empty(), in = !lane.in.empty();
            short events = static_cast<short>((out ? POLLOUT : 0) | (in ? POLLIN : 0));
            if (lane.lost) {
                lost = lost || events != 0;
                events = 0;
            }
            waits = waits || events != 0;
            files.push_back({mesh.data[rank].number(), events, 0});
        }
        if (!waits) return lost ? Outcome::Lost : Outcome::Done;
        if (wait_any(files, stop) == Outcome::Stopped) return Outcome::Stopped;
        emulator::delay(random);
        size_t most = size_t(1) << (emulator::settings().seed == 0 ? 20 : 8 + random.below(13));
        for (size_t rank = 0; rank < lanes.size(); ++rank) {
            Lane& lane = lanes[rank];
            const File& connection = mesh.data[rank];
            int from = static_cast<int>(rank);
            short ready = files[rank].revents;
            if (ready & (POLLOUT | POLLERR | POLLHUP)) {
                turn(lane.out, &lane.lost, [&](Piece& piece) { return send_some(connection, piece, most); });
            }
            if (ready & (POLLIN | POLLERR | POLLHUP)) {
                turn(lane.in, &lane.lost, [&](Piece& piece) {
                    return receive_some(connection, piece, coming[rank], most, from, self);
                });
            }
        }
    }
}

} // namespace emulated_nccl
