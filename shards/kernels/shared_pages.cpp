// Files in memory, mapped at a huge page's boundary: only then do several processes share huge pages.
#include <cerrno>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>

namespace {

constexpr int64_t kPage = 2 << 20;
// MADV_ of Linux 5.14 and 6.1, which older headers lack.
constexpr int kPopulateRead = 22, kPopulateWrite = 23, kCollapse = 25;

// Reserve addresses for `bytes` that begin with a huge page.
void* reserve(int64_t bytes) {
    void* region = mmap(nullptr, bytes + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(region);
    int64_t before = -reinterpret_cast<intptr_t>(first) & (kPage - 1);
    if (before) munmap(first, before);
    munmap(first + before + bytes, kPage - before);
    return first + before;
}

}  // namespace

// Map `bytes` of a file, whole huge pages: to be filled if `is_new`, else to be read. Return the address, or
// null, with errno: also if a new file gets no huge pages.
extern "C" void* tw_map_shared(int file, int64_t bytes, int is_new) {
    void* region = reserve(bytes);
    if (!region) return nullptr;
    int access = is_new ? PROT_READ | PROT_WRITE : PROT_READ;
    bool is_mapped = mmap(region, bytes, access, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED;
    if (is_mapped && is_new) {
        // Most systems give files in memory no huge pages, but to who asks for them like this; and then there
        // must be a small page in each. Touched by the system: it can refuse, where a write would end us.
        for (int64_t i = 0; i < bytes && is_mapped; i += kPage)
            is_mapped = madvise(static_cast<char*>(region) + i, 1, kPopulateWrite) == 0;
        is_mapped = is_mapped && madvise(region, bytes, kCollapse) == 0;
    } else if (is_mapped) {
        madvise(region, bytes, kPopulateRead);  // or the first rows do it, page by page
    }
    if (is_mapped) return region;
    int reason = errno;
    munmap(region, bytes);
    errno = reason;
    return nullptr;
}

extern "C" void tw_unmap(void* region, int64_t bytes) { munmap(region, bytes); }
#else
extern "C" void* tw_map_shared(int, int64_t, int) {
    errno = ENOSYS;
    return nullptr;
}

extern "C" void tw_unmap(void*, int64_t) {}
#endif
