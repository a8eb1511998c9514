#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "state.hpp"

namespace emulator {

static const uint64_t PAGE = sysconf(_SC_PAGESIZE);
// what every driver promises of cuMemAlloc
constexpr uint64_t ALIGNMENT = 256;
// the first addresses of a device: enough that none is ever used again
constexpr uint64_t ARENA_BYTES_MIN = uint64_t(1) << 40;

static uint64_t round_up(uint64_t n, uint64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- rights ---------------------------------------------------------------------------------------------------------

#ifdef PKEY_DISABLE_ACCESS
static int new_key() { return pkey_alloc(0, PKEY_DISABLE_ACCESS); }
static void set_rights(int key, bool allowed) { pkey_set(key, allowed ? 0 : PKEY_DISABLE_ACCESS); }
static int protect_pages(void* pages, size_t bytes, int key) {
    return pkey_mprotect(pages, bytes, PROT_READ | PROT_WRITE, key);
}
#else
static int new_key() { return -1; }
static void set_rights(int, bool) {}
static int protect_pages(void*, size_t, int) { return 0; }
#endif

void Memory::protect(size_t devices) {
    for (size_t i = 0; i < devices; ++i) {
        int key = new_key();
        if (key < 0) {
            // fewer keys than devices: the rest share the first one; none: no protection
            if (keys_.empty()) return;
            key = keys_[0];
        }
        keys_.push_back(key);
    }
}

int Memory::key(const Context& context) const { return keys_.empty() ? -1 : keys_[context.device]; }

Access::Access(uint32_t devices) {
    const std::vector<int>& keys = state().memory.keys_;
    for (size_t i = 0; i < keys.size(); ++i) set_rights(keys[i], false);
    for (size_t i = 0; i < keys.size(); ++i) {
        if (devices >> i & 1) set_rights(keys[i], true);
    }
}

Access::~Access() {
    for (int key : state().memory.keys_) set_rights(key, false);
}

// ---- device memory --------------------------------------------------------------------------------------------------

CUresult Memory::reserve(Context& context) {
    Arena& arena = context.arena;
    if (arena.base) return CUDA_SUCCESS;
    arena.bytes = std::max(ARENA_BYTES_MIN, settings().memory_bytes * 32);
    arena.file = memfd_create("emulated device memory", MFD_CLOEXEC);
    if (arena.file < 0 || ftruncate(arena.file, arena.bytes) != 0) {
        report("no memory for device %d: %s", context.device, std::strerror(errno));
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    void* base = mmap(nullptr, arena.bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, arena.file, 0);
    if (base == MAP_FAILED) {
        report("no addresses for device %d: %s", context.device, std::strerror(errno));
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    madvise(base, arena.bytes, MADV_DONTDUMP);
    arena.base = static_cast<char*>(base);
    arena.next = PAGE;
    return CUDA_SUCCESS;
}

// What a context itself takes of its device.
static uint64_t capacity() { return settings().memory_bytes - settings().memory_bytes / 32; }

CUresult Memory::allocate(Context& context, uint64_t bytes, CUdeviceptr* address) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > capacity() || context.used_bytes > capacity() - bytes) return CUDA_ERROR_OUT_OF_MEMORY;
    if (CUresult refused = reserve(context)) return refused;
    Arena& arena = context.arena;
    Allocation made = {};
    made.bytes = bytes;
    made.page_bytes = round_up(bytes, PAGE);
    made.pages = arena.base + arena.next;
    made.owner = &context;
    made.address = reinterpret_cast<CUdeviceptr>(made.pages) + made.page_bytes - round_up(bytes, ALIGNMENT);
    if (made.page_bytes + PAGE > arena.bytes - arena.next) die("device %d has used up its addresses", context.device);
    arena.next += made.page_bytes + PAGE;
    if (mprotect(made.pages, made.page_bytes, PROT_READ | PROT_WRITE) != 0) {
        report("%" PRIu64 " bytes of device %d: %s", bytes, context.device, std::strerror(errno));
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::memset(made.pages, GARBAGE, made.page_bytes);
    if (is_protected() && protect_pages(made.pages, made.page_bytes, key(context)) != 0) {
        die("a protection key is refused: %s", std::strerror(errno));
    }
    context.used_bytes += bytes;
    *address = made.address;
    allocations_.emplace(made.address, made);
    log_line("alloc %d %#llx %" PRIu64 " %" PRIu64 " %" PRId64, context.physical, made.address, bytes,
             context.used_bytes, now_ns());
    return CUDA_SUCCESS;
}

void Memory::check_canaries(const Allocation& allocation) const {
    Access access(ALL_DEVICES);
    uint64_t before = allocation.address - reinterpret_cast<uint64_t>(allocation.pages);
    uint64_t end = before + allocation.bytes;
    for (uint64_t i = 0; i < allocation.page_bytes; ++i) {
        if (i == before) i = end;
        if (i == allocation.page_bytes) break;
        if (static_cast<unsigned char>(allocation.pages[i]) == GARBAGE) continue;
        die("device %d: byte %" PRId64 " of the %" PRIu64 " at %#llx was written", allocation.owner->device,
            static_cast<int64_t>(i - before), allocation.bytes, allocation.address);
    }
}

// Whether another process has a part of the file open.
static bool is_locked(int file, uint64_t offset, uint64_t bytes) {
    struct flock range = {};
    range.l_type = F_WRLCK;
    range.l_whence = SEEK_SET;
    range.l_start = offset;
    range.l_len = bytes;
    return fcntl(file, F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

void Memory::free(CUdeviceptr address) {
    auto found = allocations_.find(address);
    const Allocation& allocation = found->second;
    Context& context = *allocation.owner;
    check_canaries(allocation);
    uint64_t offset = allocation.pages - context.arena.base;
    if (is_locked(context.arena.file, offset, allocation.page_bytes)) {
        die("device %d: the %" PRIu64 " bytes at %#llx are freed while another process has them open", context.device,
            allocation.bytes, address);
    }
    if (mprotect(allocation.pages, allocation.page_bytes, PROT_NONE) != 0 ||
        fallocate(context.arena.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, allocation.page_bytes) != 0) {
        die("memory of device %d cannot be freed: %s", context.device, std::strerror(errno));
    }
    context.used_bytes -= allocation.bytes;
    log_line("free %d %#llx %" PRIu64 " %" PRIu64 " %" PRId64, context.physical, address, allocation.bytes,
             context.used_bytes, now_ns());
    allocations_.erase(found);
}

static void unmap_opened(const Allocation& allocation) {
    // the addresses stay taken, so that a late access finds nothing rather than something else
    constexpr int KIND = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    void* none = mmap(allocation.pages, allocation.page_bytes, PROT_NONE, KIND, -1, 0);
    if (none == MAP_FAILED) die("memory of another process cannot be closed: %s", std::strerror(errno));
}

void Memory::free_all(const Context& context) {
    for (auto at = allocations_.begin(); at != allocations_.end();) {
        const Allocation allocation = (at++)->second;
        if (allocation.owner != &context) continue;
        if (allocation.opened == 0) {
            free(allocation.address);
        } else {
            unmap_opened(allocation);
            allocations_.erase(allocation.address);
        }
    }
    for (auto at = host_ranges_.begin(); at != host_ranges_.end();) {
        const HostRange range = *(at++)->second;
        if (range.owner != &context) continue;
        if (range.allocated) {
            free_host(range.address);
        } else {
            unregister_host(range.address);
        }
    }
}

Allocation* Memory::at(CUdeviceptr address) {
    auto found = allocations_.find(address);
    return found == allocations_.end() ? nullptr : &found->second;
}

Allocation* Memory::holding(CUdeviceptr address, uint64_t bytes) {
    auto after = allocations_.upper_bound(address);
    if (after == allocations_.begin()) return nullptr;
    Allocation& candidate = std::prev(after)->second;
    bool inside = address < candidate.address + candidate.bytes && candidate.contains(address, bytes);
    return inside ? &candidate : nullptr;
}

bool Memory::is_device_address(uint64_t address) const {
    for (const auto& context : state().contexts) {
        uint64_t base = reinterpret_cast<uint64_t>(context->arena.base);
        if (base != 0 && address >= base && address - base < context->arena.bytes) return true;
    }
    return false;
}

bool Memory::is_opened(uint64_t address) const {
    for (const auto& [start, allocation] : allocations_) {
        if (allocation.opened != 0 && address >= start && address - start <= allocation.bytes) return true;
    }
    return false;
}

// ---- memory of other processes --------------------------------------------------------------------------------------

// Where the memory is: a range of a file that another process has open.
struct Exported {
    uint32_t magic;
    int32_t process, file, physical;
    uint64_t inode, offset, page_bytes, before, bytes;
};
static_assert(sizeof(Exported) <= sizeof(CUipcMemHandle), "fits a handle");
constexpr uint32_t EXPORTED = 0x43504945;

CUresult Memory::export_handle(const Allocation& allocation, CUipcMemHandle* handle) const {
    if (allocation.opened != 0) return CUDA_ERROR_INVALID_VALUE;
    const Arena& arena = allocation.owner->arena;
    struct stat status;
    if (fstat(arena.file, &status) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
    Exported exported = {EXPORTED,
                         getpid(),
                         arena.file,
                         allocation.owner->physical,
                         status.st_ino,
                         static_cast<uint64_t>(allocation.pages - arena.base),
                         allocation.page_bytes,
                         allocation.address - reinterpret_cast<uint64_t>(allocation.pages),
                         allocation.bytes};
    *handle = {};
    std::memcpy(handle, &exported, sizeof exported);
    return CUDA_SUCCESS;
}

// A description of the file of its own, locked where the allocation is; -1: there is no such memory any more.
static int open_exported(const Exported& exported) {
    std::string path = "/proc/" + std::to_string(exported.process) + "/fd/" + std::to_string(exported.file);
    int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) return -1;
    struct flock range = {};
    range.l_type = F_RDLCK;
    range.l_whence = SEEK_SET;
    range.l_start = exported.offset;
    range.l_len = exported.page_bytes;
    struct stat status;
    bool same = fstat(file, &status) == 0 && status.st_ino == exported.inode;
    // what is freed is a hole
    bool there = same && fcntl(file, F_OFD_SETLK, &range) == 0 &&
                 lseek(file, exported.offset, SEEK_DATA) == static_cast<off_t>(exported.offset);
    if (there) return file;
    close(file);
    return -1;
}

CUresult Memory::open_handle(Context& context, const CUipcMemHandle& handle, CUdeviceptr* address) {
    Exported exported;
    std::memcpy(&exported, &handle, sizeof exported);
    if (exported.magic != EXPORTED) return CUDA_ERROR_INVALID_VALUE;
    if (exported.process == getpid()) {
        report("memory of this process is opened as if it were another's");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    for (auto& [at, known] : allocations_) {
        if (known.opened == 0 || std::memcmp(&known.handle, &handle, sizeof handle) != 0) continue;
        if (known.owner != &context) return CUDA_ERROR_INVALID_CONTEXT;
        ++known.opened;
        *address = at;
        return CUDA_SUCCESS;
    }
    int file = open_exported(exported);
    if (file < 0) {
        report("the memory of process %d is not there to open", exported.process);
        return CUDA_ERROR_INVALID_VALUE;
    }
    // pages that nobody may touch on either side
    uint64_t reserved = exported.page_bytes + 2 * PAGE;
    void* around = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (around == MAP_FAILED) die("no addresses for memory of another process: %s", std::strerror(errno));
    Allocation opened = {};
    opened.bytes = exported.bytes;
    opened.page_bytes = exported.page_bytes;
    opened.pages = static_cast<char*>(around) + PAGE;
    opened.owner = &context;
    opened.address = reinterpret_cast<CUdeviceptr>(opened.pages) + exported.before;
    opened.opened = 1;
    opened.handle = handle;
    int rights = is_protected() ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* mapped = mmap(opened.pages, opened.page_bytes, rights, MAP_SHARED | MAP_FIXED, file, exported.offset);
    // the lock lives as long as the mapping
    close(file);
    if (mapped == MAP_FAILED ||
        (is_protected() && protect_pages(opened.pages, opened.page_bytes, key(context)) != 0)) {
        die("memory of another process cannot be mapped: %s", std::strerror(errno));
    }
    *address = opened.address;
    allocations_.emplace(opened.address, opened);
    log_line("open %d %#llx %" PRIu64 " %" PRIu64 " %" PRId64, context.physical, opened.address, opened.bytes,
             context.used_bytes, now_ns());
    return CUDA_SUCCESS;
}

CUresult Memory::close_handle(CUdeviceptr address) {
    Allocation* opened = at(address);
    if (!opened || opened->opened == 0) return CUDA_ERROR_INVALID_VALUE;
    if (--opened->opened > 0) return CUDA_SUCCESS;
    unmap_opened(*opened);
    log_line("close %d %#llx %" PRIu64 " %" PRIu64 " %" PRId64, opened->owner->physical, address, opened->bytes,
             opened->owner->used_bytes, now_ns());
    allocations_.erase(address);
    return CUDA_SUCCESS;
}

// ---- host memory ----------------------------------------------------------------------------------------------------

// Whether all of it is mapped, for writing too unless it need not be.
static bool is_mapped(uint64_t address, uint64_t bytes, bool read_only) {
    std::FILE* maps = std::fopen("/proc/self/maps", "re");
    if (!maps) return true;
    uint64_t reached = address, end = address + bytes;
    char line[512];
    while (reached < end && std::fgets(line, sizeof line, maps)) {
        uint64_t from, to;
        char rights[5];
        if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &from, &to, rights) != 3 || to <= reached) continue;
        if (from > reached || rights[0] != 'r' || (rights[1] != 'w' && !read_only)) break;
        reached = to;
    }
    std::fclose(maps);
    return reached >= end;
}

CUresult Memory::register_host(const Context& context, uint64_t address, uint64_t bytes, bool read_only) {
    if (address == 0 || bytes == 0 || is_device_address(address)) return CUDA_ERROR_INVALID_VALUE;
    bool partly = false;
    if (host_range(address, bytes, &partly) || partly) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (!is_mapped(address, bytes, read_only)) return CUDA_ERROR_INVALID_VALUE;
    host_ranges_.emplace(address, std::make_shared<HostRange>(HostRange{&context, address, bytes, false}));
    return CUDA_SUCCESS;
}

CUresult Memory::allocate_host(const Context& context, uint64_t bytes, void** address) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    uint64_t pages = round_up(bytes, PAGE);
    void* around = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (around == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char* inside = static_cast<char*>(around) + PAGE;
    if (mprotect(inside, pages, PROT_READ | PROT_WRITE) != 0) {
        munmap(around, pages + 2 * PAGE);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::memset(inside, GARBAGE, pages);
    uint64_t at = reinterpret_cast<uint64_t>(inside);
    host_ranges_.emplace(at, std::make_shared<HostRange>(HostRange{&context, at, bytes, true}));
    *address = inside;
    return CUDA_SUCCESS;
}

std::shared_ptr<HostRange> Memory::take_host_range(uint64_t address, bool allocated, const char* verb) {
    auto found = host_ranges_.find(address);
    if (found == host_ranges_.end() || found->second->allocated != allocated) return nullptr;
    std::shared_ptr<HostRange> range = found->second;
    if (range->uses > 0) {
        die("%" PRIu64 " bytes of host memory at %#" PRIx64 " are %s while %u operations use them", range->bytes,
            address, verb, range->uses);
    }
    host_ranges_.erase(found);
    return range;
}

CUresult Memory::unregister_host(uint64_t address) {
    return take_host_range(address, false, "unregistered") ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

CUresult Memory::free_host(uint64_t address) {
    std::shared_ptr<HostRange> range = take_host_range(address, true, "freed");
    if (!range) return CUDA_ERROR_INVALID_VALUE;
    munmap(reinterpret_cast<char*>(address) - PAGE, round_up(range->bytes, PAGE) + 2 * PAGE);
    return CUDA_SUCCESS;
}

std::shared_ptr<HostRange> Memory::host_range(uint64_t address, uint64_t bytes, bool* partly) const {
    auto after = host_ranges_.lower_bound(address + bytes);
    if (after == host_ranges_.begin()) return nullptr;
    const std::shared_ptr<HostRange>& last = std::prev(after)->second;
    if (last->address <= address && bytes <= last->address + last->bytes - address &&
        address < last->address + last->bytes) {
        return last;
    }
    if (partly) *partly = last->address + last->bytes > address;
    return nullptr;
}

} // namespace emulator
