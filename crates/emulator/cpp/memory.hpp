// Device memory, which only streams can touch, and host memory that streams can.
//
// The memory of a device is a sparse file without a name, of which a reserved range of addresses is a mapping. An
// allocation gets the next addresses, never used before, and pages around it that nobody may touch; it ends where its
// last page does, up to alignment. Its pages have the device's protection key, which threads of the program have no
// rights to. Freed pages become inaccessible and stay so.
//
//   … | guard | canary | allocation, a multiple of 256 from here | canary | guard | next …
//             ^ page                                                     ^ page
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>

#include "abi.hpp"

namespace emulator {

struct Context;

constexpr unsigned char GARBAGE = 0xc5;

struct Arena {
    int file = -1;
    char* base = nullptr;
    uint64_t bytes = 0, next = 0;
};

struct Allocation {
    CUdeviceptr address;
    uint64_t bytes;
    char* pages;
    uint64_t page_bytes;
    Context* owner;
    // of another process: opened this often
    unsigned opened = 0;
    // of another process: which memory that is
    CUipcMemHandle handle = {};

    bool contains(CUdeviceptr at, uint64_t count) const { return at >= address && count <= address + bytes - at; }
};

struct HostRange {
    // ends with it, and is for all devices
    const Context* owner;
    uint64_t address, bytes;
    // by the driver, rather than registered
    bool allocated;
    // operations that have not ended
    unsigned uses = 0;
};

class Memory {
  public:
    // Before the first allocation: a key for each device, as far as the processor has some.
    void protect(size_t devices);
    bool is_protected() const { return !keys_.empty(); }

    CUresult allocate(Context& context, uint64_t bytes, CUdeviceptr* address);
    // Once all work of the owner has ended.
    void free(CUdeviceptr address);
    // All that a context has, of host memory too.
    void free_all(const Context& context);
    // The allocation that starts there.
    Allocation* at(CUdeviceptr address);
    // The allocation that holds all of these bytes; one past the end counts for none.
    Allocation* holding(CUdeviceptr address, uint64_t bytes);
    // Whether the address is one that device memory has or had.
    bool is_device_address(uint64_t address) const;
    // Whether it is within memory of another process, or one past its end.
    bool is_opened(uint64_t address) const;

    CUresult export_handle(const Allocation& allocation, CUipcMemHandle* handle) const;
    CUresult open_handle(Context& context, const CUipcMemHandle& handle, CUdeviceptr* address);
    CUresult close_handle(CUdeviceptr address);

    CUresult register_host(const Context& context, uint64_t address, uint64_t bytes, bool read_only);
    CUresult allocate_host(const Context& context, uint64_t bytes, void** address);
    // Ends the process where operations still use it.
    CUresult unregister_host(uint64_t address);
    CUresult free_host(uint64_t address);
    // The range that holds all of these bytes. `partly`: one holds some of them.
    std::shared_ptr<HostRange> host_range(uint64_t address, uint64_t bytes, bool* partly = nullptr) const;

  private:
    friend class Access;
    // by device; empty: unprotected
    std::vector<int> keys_;
    std::map<CUdeviceptr, Allocation> allocations_;
    std::map<uint64_t, std::shared_ptr<HostRange>> host_ranges_;

    CUresult reserve(Context& context);
    void check_canaries(const Allocation& allocation) const;
    int key(const Context& context) const;
    std::shared_ptr<HostRange> take_host_range(uint64_t address, bool allocated, const char* verb);
};

// Rights of this thread to the memory of devices (as bits), for as long as it lives.
class Access {
  public:
    explicit Access(uint32_t devices);
    ~Access();
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;
};
constexpr uint32_t ALL_DEVICES = ~uint32_t(0);

} // namespace emulator
