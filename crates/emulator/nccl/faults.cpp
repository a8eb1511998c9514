#include "faults.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

#include "../cpp/settings.hpp"

using emulator::die;
using emulator::report;

namespace emulated_nccl {

struct Code {
    const char* name;
    const char* text;
};
// Source: ncclGetErrorString in init.cc, 2.27.7.
static const Code CODES[] = {
    {"ncclSuccess", "no error"},
    {"ncclUnhandledCudaError", "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"},
    {"ncclSystemError", "unhandled system error (run with NCCL_DEBUG=INFO for details)"},
    {"ncclInternalError", "internal error - please report this issue to the NCCL developers"},
    {"ncclInvalidArgument", "invalid argument (run with NCCL_DEBUG=WARN for details)"},
    {"ncclInvalidUsage", "invalid usage (run with NCCL_DEBUG=WARN for details)"},
    {"ncclRemoteError", "remote process exited or there was a network error"},
    {"ncclInProgress", "NCCL operation in progress"},
};
constexpr int CODE_COUNT = sizeof CODES / sizeof CODES[0];
constexpr ncclResult_t HANG = -1;

const char* text_of(ncclResult_t code) {
    return code >= 0 && code < CODE_COUNT ? CODES[code].text : "unknown result code";
}

// ---- failures on demand ---------------------------------------------------------------------------------------------

struct Injection {
    std::string call;
    uint64_t nth;
    bool all_later;
    ncclResult_t code;
    uint64_t seen = 0;
};

static Injection parsed(const std::string& text) {
    size_t colon = text.find(':'), equals = text.find('=');
    if (colon == std::string::npos || equals == std::string::npos || equals < colon) {
        die("NCCL: no failure is named by %s", text.c_str());
    }
    std::string nth = text.substr(colon + 1, equals - colon - 1), code = text.substr(equals + 1);
    Injection injection = {text.substr(0, colon), std::strtoull(nth.c_str(), nullptr, 10), nth.back() == '+', 0};
    if (code == "hang") injection.code = HANG;
    for (int i = 0; i < CODE_COUNT; ++i) {
        if (code == CODES[i].name) injection.code = i;
    }
    if (injection.nth == 0 || injection.code == ncclSuccess) die("NCCL: no failure is named by %s", text.c_str());
    return injection;
}

static std::vector<Injection>* injections() {
    auto* all = new std::vector<Injection>;
    const char* list = std::getenv("EMULATED_NCCL_FAIL");
    std::string text = list ? list : "";
    for (size_t at = 0; at < text.size();) {
        size_t end = text.find(',', at);
        if (end == std::string::npos) end = text.size();
        all->push_back(parsed(text.substr(at, end - at)));
        at = end + 1;
    }
    return all;
}

static ncclResult_t look_up(const char* call) {
    static std::vector<Injection>* const all = injections();
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    ncclResult_t code = ncclSuccess;
    for (Injection& one : *all) {
        if (one.call != call) continue;
        ++one.seen;
        if (one.seen == one.nth || (one.all_later && one.seen > one.nth)) code = one.code;
    }
    return code;
}

ncclResult_t injected(const char* call) {
    ncclResult_t code = look_up(call);
    if (code == ncclSuccess) return code;
    if (code != HANG) return warn(code, "%s is made to fail", call);
    report("NCCL: %s is made to hang", call);
    for (;;) pause();
}

bool lost_rank_is_error() {
    static const bool error = [] {
        const char* value = std::getenv("EMULATED_NCCL_LOST_RANK");
        if (!value || !*value || std::strcmp(value, "hang") == 0) return false;
        if (std::strcmp(value, "error") != 0) die("NCCL: EMULATED_NCCL_LOST_RANK is hang or error, not %s", value);
        return true;
    }();
    return error;
}

// ---- the last error -------------------------------------------------------------------------------------------------

static std::mutex last_mutex;
// handed out while others write: never ends beyond itself
static char last[1024];

ncclResult_t warn(ncclResult_t code, const char* format, ...) {
    char text[sizeof last];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    std::lock_guard<std::mutex> lock(last_mutex);
    std::strcpy(last, text);
    return code;
}

const char* last_error() { return last; }

} // namespace emulated_nccl
