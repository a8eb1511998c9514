#include "settings.hpp"

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <mutex>
#include <sched.h>
#include <unistd.h>

namespace emulator {

static const char* variable(const char* name) {
    const char* value = std::getenv(name);
    return value && *value ? value : nullptr;
}

static uint64_t number(const char* name, uint64_t otherwise) {
    const char* value = variable(name);
    if (!value) return otherwise;
    char* end = nullptr;
    errno = 0;
    uint64_t n = std::strtoull(value, &end, 10);
    if (errno != 0 || *end != 0) die("%s is no number: %s", name, value);
    return n;
}

// As the real driver reads CUDA_VISIBLE_DEVICES: up to the first entry that is none. Only ordinals.
static std::vector<int> visible_devices() {
    int count = static_cast<int>(number("EMULATED_CUDA_DEVICES", 2));
    std::vector<int> devices;
    const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
    if (!list) {
        for (int i = 0; i < count; ++i) devices.push_back(i);
        return devices;
    }
    while (*list) {
        char* end = nullptr;
        long device = std::strtol(list, &end, 10);
        if (end == list || device < 0 || device >= count) break;
        devices.push_back(static_cast<int>(device));
        list = *end == ',' ? end + 1 : end;
        if (*end != ',') break;
    }
    return devices;
}

const Settings& settings() {
    static const Settings* const read = new Settings{
        visible_devices(),
        number("EMULATED_CUDA_MEMORY_BYTES", uint64_t(8) << 30),
        static_cast<int>(number("EMULATED_CUDA_MULTIPROCESSORS", 4)),
        static_cast<int>(number("EMULATED_CUDA_DRIVER_VERSION", 13000)),
        number("EMULATED_CUDA_SEED", 0),
        number("EMULATED_CUDA_DELAY_US_MAX", 2000),
        number("EMULATED_CUDA_LATE_US", 0),
        number("EMULATED_CUDA_OPERATION_US_MIN", 0),
    };
    return *read;
}

static void sleep_us(uint64_t us) {
    timespec time = {static_cast<time_t>(us / 1000000), static_cast<long>(us % 1000000) * 1000};
    while (nanosleep(&time, &time) != 0 && errno == EINTR) {
    }
}

void delay(Random& random) {
    uint64_t longest = settings().delay_us_max;
    if (settings().seed == 0 || longest == 0) return;
    switch (random.below(8)) {
    case 0:
        return sleep_us(random.below(longest + 1));
    case 1:
        return sleep_us(random.below(longest / 4 + 1));
    case 2:
    case 3:
        return sleep_us(random.below(longest / 16 + 1));
    case 4:
        sched_yield();
        return;
    default:
        return;
    }
}

void take_the_time(int64_t start_ns) {
    int64_t left_us = static_cast<int64_t>(settings().operation_us_min) - (now_ns() - start_ns) / 1000;
    if (left_us > 0) sleep_us(left_us);
}

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
}

// One write each, so that lines of several threads and processes stay whole.
static void write_line(int file, const char* prefix, const char* format, va_list arguments) {
    char line[1024];
    int length = std::snprintf(line, sizeof line, "%s", prefix);
    length += std::vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    if (length > static_cast<int>(sizeof line) - 2) length = sizeof line - 2;
    line[length++] = '\n';
    // nobody to tell where it cannot be written
    if (write(file, line, length) < 0) return;
}

void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_line(STDERR_FILENO, "emulated CUDA driver: ", format, arguments);
    va_end(arguments);
}

void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_line(STDERR_FILENO, "emulated CUDA driver: ", format, arguments);
    va_end(arguments);
    std::abort();
}

static int log_file() {
    static const int file = [] {
        const char* path = variable("EMULATED_CUDA_LOG");
        if (!path) return -1;
        int opened = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (opened < 0) die("no log at %s: %s", path, std::strerror(errno));
        return opened;
    }();
    return file;
}

void log_line(const char* format, ...) {
    if (log_file() < 0) return;
    char pid[24];
    std::snprintf(pid, sizeof pid, "%d ", getpid());
    va_list arguments;
    va_start(arguments, format);
    write_line(log_file(), pid, format, arguments);
    va_end(arguments);
}

struct Error {
    const char* name;
    CUresult number;
    const char* text;
};
#define ERROR(name, number, text) {"CUDA_ERROR_" #name, number, text},
static const Error ERRORS[] = {{"CUDA_SUCCESS", 0, "no error"}, CUDA_ERRORS(ERROR)};
#undef ERROR

const char* error_name(CUresult error) {
    for (const Error& known : ERRORS) {
        if (known.number == error) return known.name;
    }
    return nullptr;
}

const char* error_text(CUresult error) {
    for (const Error& known : ERRORS) {
        if (known.number == error) return known.text;
    }
    return nullptr;
}

bool is_sticky(CUresult error) {
    switch (error) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_EXTERNAL_DEVICE:
    case CUDA_ERROR_UNKNOWN:
        return true;
    default:
        return false;
    }
}

// ---- failures on demand ---------------------------------------------------------------------------------------------

// `copy@1:17+=CUDA_ERROR_…`: calls of a kind or name, of one device or all, the 17th or (+) all from there on.
struct Injection {
    std::string calls;
    int device;
    uint64_t nth;
    bool all_later;
    CUresult error;
    uint64_t seen = 0;
};

static Injection parsed(const std::string& text) {
    size_t colon = text.find(':'), equals = text.find('=', colon);
    if (colon == std::string::npos || equals == std::string::npos) die("no failure is named by %s", text.c_str());
    Injection injection = {text.substr(0, colon), -1, 0, false, 0};
    size_t at = injection.calls.find('@');
    if (at != std::string::npos) {
        injection.device = std::atoi(injection.calls.c_str() + at + 1);
        injection.calls.resize(at);
    }
    std::string nth = text.substr(colon + 1, equals - colon - 1);
    injection.all_later = !nth.empty() && nth.back() == '+';
    injection.nth = std::strtoull(nth.c_str(), nullptr, 10);
    std::string name = text.substr(equals + 1);
    for (const Error& known : ERRORS) {
        if (name == known.name) injection.error = known.number;
    }
    if (injection.nth == 0 || injection.error == 0) die("no failure is named by %s", text.c_str());
    return injection;
}

static std::vector<Injection> injections() {
    std::vector<Injection> all;
    const char* list = variable("EMULATED_CUDA_FAIL");
    std::string text = list ? list : "";
    for (size_t at = 0; at < text.size();) {
        size_t end = text.find(',', at);
        if (end == std::string::npos) end = text.size();
        all.push_back(parsed(text.substr(at, end - at)));
        at = end + 1;
    }
    return all;
}

CUresult injected(const char* kind, const char* name, int device) {
    static std::vector<Injection>* const all = new std::vector<Injection>(injections());
    static std::mutex mutex;
    if (all->empty()) return CUDA_SUCCESS;
    std::lock_guard<std::mutex> lock(mutex);
    CUresult error = CUDA_SUCCESS;
    for (Injection& one : *all) {
        if (one.calls != kind && one.calls != name) continue;
        if (one.device >= 0 && one.device != device) continue;
        ++one.seen;
        if (one.seen == one.nth || (one.all_later && one.seen > one.nth)) error = one.error;
    }
    if (error != CUDA_SUCCESS) report("%s is made to fail on device %d: %s", name, device, error_name(error));
    return error;
}

} // namespace emulator
