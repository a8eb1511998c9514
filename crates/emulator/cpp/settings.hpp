// What a test decides about the driver, by environment variables; what the driver says, on stderr and in a log.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "abi.hpp"

namespace emulator {

struct Settings {
    // physical numbers of the visible devices
    std::vector<int> devices;
    uint64_t memory_bytes;
    int multiprocessors;
    int driver_version;
    // 0: nothing is delayed on purpose
    uint64_t seed;
    uint64_t delay_us_max;
    // how long after it was queued an operation begins, unless somebody waits for it
    uint64_t late_us;
    // how long a copy or kernel takes, at least
    uint64_t operation_us_min;
};

// Read once.
const Settings& settings();

// xorshift64*, as the tests have it.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 | 1) {
        for (int i = 0; i < 4; ++i) next();
    }
    uint64_t below(uint64_t end) { return (next() >> 33) % end; }

  private:
    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1d;
    }
    uint64_t state_;
};

// Sleeps as the settings allow: mostly not, now and then long.
void delay(Random& random);

// Sleeps until an operation that began then has taken as long as it has to.
void take_the_time(int64_t start_ns);

// Nanoseconds of the clock that all processes of a host share.
int64_t now_ns();

// A line on stderr.
__attribute__((format(printf, 1, 2))) void report(const char* format, ...);
// The same, and the end: the program did what leaves memory in an unknown state.
[[noreturn]] __attribute__((format(printf, 1, 2))) void die(const char* format, ...);
// A line in the log, where one is kept.
__attribute__((format(printf, 1, 2))) void log_line(const char* format, ...);

const char* error_name(CUresult error);
const char* error_text(CUresult error);
// Whether a context is lost by it: all later calls fail with the same.
bool is_sticky(CUresult error);

// The error that this call is to fail with, or success. `kind` groups calls; `name` is the function's own.
CUresult injected(const char* kind, const char* name, int device);

} // namespace emulator
