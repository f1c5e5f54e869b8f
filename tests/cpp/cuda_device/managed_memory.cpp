// Whatever a test allocates, host and GPU both reach. Kernels are launched in blocking mode, so that results are there
// when an op returns; a test therefore reads them as it would on the CPU.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace {

constexpr size_t arena_bytes = size_t{8} << 30, align = 256;  // the driver supplies pages when they are touched

struct Arena {
  char *begin = nullptr, *next = nullptr;
  std::mutex mutex;

  bool owns(void* p) const { return begin && p >= begin && p < begin + arena_bytes; }
};

Arena arena;
bool ready = false;  // before that, memory is the host's alone: of static objects, and of the CUDA runtime

// Pieces are never given back: a test program takes a few GiB in all, and a stale pointer shows as stale numbers.
void* take(size_t bytes) {
  if (!ready) return std::malloc(bytes);
  const std::lock_guard<std::mutex> lock(arena.mutex);
  bytes = (bytes + align - 1) / align * align;
  if (arena.next + bytes > arena.begin + arena_bytes) return nullptr;
  void* at = arena.next;
  arena.next += bytes;
  return at;
}

}  // namespace

void* operator new(size_t bytes) {
  void* at = take(bytes ? bytes : 1);
  if (!at) throw std::bad_alloc();
  return at;
}
void operator delete(void* p) noexcept {
  if (!arena.owns(p)) std::free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

int main(int argc, char** argv) {
  setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  testing::InitGoogleTest(&argc, argv);
  void* memory = nullptr;
  int concurrent = 0;
  if (const cudaError_t e = cudaMallocManaged(&memory, arena_bytes); e != cudaSuccess) {
    std::fprintf(stderr, "no GPU to test on: %s\n", cudaGetErrorString(e));
    return 1;
  }
  cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, 0);
  if (!concurrent) {
    std::fprintf(stderr, "this GPU and the host cannot use managed memory at the same time\n");
    return 1;
  }
  arena.begin = arena.next = static_cast<char*>(memory);
  ready = true;
  const int result = RUN_ALL_TESTS();
  ready = false;
  return result;
}
