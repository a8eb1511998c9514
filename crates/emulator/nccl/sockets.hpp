// Connections between ranks: abstract Unix sockets, every wait of which ends when it is told to.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include <poll.h>

namespace emulated_nccl {

// A file that is closed in the end.
class File {
  public:
    File() = default;
    explicit File(int number) : number_(number) {}
    File(File&& other) noexcept : number_(other.number_) { other.number_ = -1; }
    File& operator=(File&& other) noexcept;
    ~File();
    int number() const { return number_; }
    explicit operator bool() const { return number_ >= 0; }

  private:
    int number_ = -1;
};

// Tells all that wait to stop, for good.
class Stop {
  public:
    Stop();
    void tell();
    bool told() const { return told_.load(std::memory_order_acquire); }
    int number() const { return event_.number(); }

  private:
    File event_;
    std::atomic<bool> told_{false};
};

// What became of a wait or a transfer.
enum class Outcome { Done, Lost, Stopped };

// A socket that listens; none where the name is taken.
File listen_at(const std::string& name);
// The next connection.
Outcome accept_from(const File& listening, const Stop& stop, File* connection);
// Tries until somebody listens there.
Outcome connect_to(const std::string& name, const Stop& stop, File* connection);
// All of it, or as far as it came.
Outcome send_all(const File& connection, const void* bytes, size_t count, const Stop& stop);
Outcome receive_all(const File& connection, void* bytes, size_t count, const Stop& stop);

// Waits for one of the files, without limit; those with events of 0 are not waited for.
Outcome wait_any(std::vector<pollfd>& files, const Stop& stop);
// Waits until it is told to stop.
void wait_stop(const Stop& stop);

} // namespace emulated_nccl
