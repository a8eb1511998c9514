#include "sockets.hpp"

#include <cerrno>
#include <cstring>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../cpp/settings.hpp"

using emulator::die;

namespace emulated_nccl {

File& File::operator=(File&& other) noexcept {
    if (this != &other) {
        if (number_ >= 0) close(number_);
        number_ = other.number_;
        other.number_ = -1;
    }
    return *this;
}

File::~File() {
    if (number_ >= 0) close(number_);
}

Stop::Stop() : event_(eventfd(0, EFD_CLOEXEC)) {
    if (!event_) die("NCCL: no eventfd: %s", std::strerror(errno));
}

void Stop::tell() {
    told_.store(true, std::memory_order_release);
    // readable for ever, as nobody reads it
    eventfd_write(event_.number(), 1);
}

static sockaddr_un address_of(const std::string& name, socklen_t* length) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (name.size() + 1 > sizeof address.sun_path) die("NCCL: no name of a socket: %s", name.c_str());
    // abstract: the name begins with a zero, and is nowhere in the file system
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    return address;
}

static File new_socket() {
    File made(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!made) die("NCCL: no socket: %s", std::strerror(errno));
    return made;
}

File listen_at(const std::string& name) {
    File made = new_socket();
    socklen_t length;
    sockaddr_un address = address_of(name, &length);
    if (bind(made.number(), reinterpret_cast<sockaddr*>(&address), length) != 0) return File();
    if (listen(made.number(), 1024) != 0) die("NCCL: nobody can listen: %s", std::strerror(errno));
    return made;
}

Outcome wait_any(std::vector<pollfd>& files, const Stop& stop) {
    for (pollfd& file : files) {
        // a connection that is lost is always readable: not to those who do not ask
        if (file.events == 0) file.fd = -1;
    }
    files.push_back({stop.number(), POLLIN, 0});
    while (poll(files.data(), files.size(), -1) < 0) {
        if (errno != EINTR) die("NCCL: poll: %s", std::strerror(errno));
    }
    files.pop_back();
    return stop.told() ? Outcome::Stopped : Outcome::Done;
}

static Outcome wait_one(const File& file, short events, const Stop& stop) {
    std::vector<pollfd> files = {{file.number(), events, 0}};
    return wait_any(files, stop);
}

void wait_stop(const Stop& stop) {
    std::vector<pollfd> none;
    while (wait_any(none, stop) != Outcome::Stopped) {
    }
}

Outcome accept_from(const File& listening, const Stop& stop, File* connection) {
    for (;;) {
        if (wait_one(listening, POLLIN, stop) == Outcome::Stopped) return Outcome::Stopped;
        *connection = File(accept4(listening.number(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (*connection) return Outcome::Done;
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) die("NCCL: accept: %s", std::strerror(errno));
    }
}

Outcome connect_to(const std::string& name, const Stop& stop, File* connection) {
    socklen_t length;
    sockaddr_un address = address_of(name, &length);
    while (!stop.told()) {
        *connection = new_socket();
        if (connect(connection->number(), reinterpret_cast<sockaddr*>(&address), length) == 0) return Outcome::Done;
        pollfd stopped = {stop.number(), POLLIN, 0};
        poll(&stopped, 1, 2);
    }
    return Outcome::Stopped;
}

Outcome send_all(const File& connection, const void* bytes, size_t count, const Stop& stop) {
    const char* at = static_cast<const char*>(bytes);
    while (count > 0) {
        ssize_t sent = send(connection.number(), at, count, MSG_NOSIGNAL);
        if (sent > 0) {
            at += sent;
            count -= static_cast<size_t>(sent);
        } else if (errno == EAGAIN) {
            if (wait_one(connection, POLLOUT, stop) == Outcome::Stopped) return Outcome::Stopped;
        } else if (errno != EINTR) {
            return Outcome::Lost;
        }
    }
    return Outcome::Done;
}

Outcome receive_all(const File& connection, void* bytes, size_t count, const Stop& stop) {
    char* at = static_cast<char*>(bytes);
    while (count > 0) {
        ssize_t got = recv(connection.number(), at, count, 0);
        if (got > 0) {
            at += got;
            count -= static_cast<size_t>(got);
        } else if (got < 0 && errno == EAGAIN) {
            if (wait_one(connection, POLLIN, stop) == Outcome::Stopped) return Outcome::Stopped;
        } else if (got == 0 || errno != EINTR) {
            return Outcome::Lost;
        }
    }
    return Outcome::Done;
}

} // namespace emulated_nccl
