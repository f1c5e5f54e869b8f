#include "xtuner/shared_memory.h"

#include <cerrno>
#include <cstring>

#include "cpu/exchange.h"
#include "cpu/shared_heap.h"
#include "xtuner/error.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <random>
#endif

namespace xt {

#ifdef __linux__
namespace {

constexpr int64_t index_bytes = int64_t{1} << 20;  // loads of 2^18 experts; virtual until touched
constexpr int64_t page = 4096;

// What a rank tells the others about its memory. `nonce` is also its last 8 bytes: whoever opens another process's file
// by mistake notices.
struct Hello {
  int64_t pid, fd, data_bytes, total_bytes;
  uint64_t nonce;
};

uint64_t* nonce_at(void* segment, int64_t total_bytes) {
  return reinterpret_cast<uint64_t*>(static_cast<char*>(segment) + total_bytes - 8);
}

void* map(int fd, int64_t bytes) {
  void* at = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return nullptr;
  madvise(at, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish: many systems have no huge pages for shared memory
  return at;
}

std::string last_error() { return std::strerror(errno); }

// Maps the segment of another rank; an error message, or nothing when all went well.
std::string map_peer(int rank, const Hello& hello, void** segment) {
  const std::string path = "/proc/" + std::to_string(hello.pid) + "/fd/" + std::to_string(hello.fd);
  const std::string who = "the memory of rank " + std::to_string(rank) + " (" + path + ")";
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return who + " cannot be opened: " + last_error() + "; all ranks must run on one machine, as one user";
  struct stat info = {};
  void* at = fstat(fd, &info) == 0 && info.st_size == hello.total_bytes ? map(fd, hello.total_bytes) : nullptr;
  const std::string problem = at ? "" : who + " cannot be mapped: " + last_error();
  close(fd);
  if (!at) return problem;
  if (*nonce_at(at, hello.total_bytes) != hello.nonce) {
    munmap(at, static_cast<size_t>(hello.total_bytes));
    return who + " belongs to another process: all ranks must run on one machine";
  }
  *segment = at;
  return "";
}

int64_t total_bytes(const Peers& p) { return signal_bytes + p.block_bytes() + page; }

}  // namespace

SharedMemory::SharedMemory(int rank, int world, int64_t data_bytes, double timeout_s, const AllGather& all_gather) {
  if (world < 1 || world > max_peers) fail("SharedMemory: world must be in [1, ", max_peers, "], got ", world);
  if (rank < 0 || rank >= world) fail("SharedMemory: rank must be in [0, world=", world, "), got ", rank);
  if (data_bytes < 0) fail("SharedMemory: data_bytes must not be negative, got ", data_bytes);
  if (!(timeout_s > 0)) fail("SharedMemory: timeout_s must be positive, got ", timeout_s);
  peers_.rank = rank;
  peers_.world = world;
  peers_.timeout_s = timeout_s;
  peers_.index_bytes = index_bytes;
  peers_.data_bytes = (data_bytes + page - 1) / page * page;
  heap_ = std::make_unique<cpu::SharedHeap>(peers_.data_bytes, world == 1);

  Hello hello = {getpid(), -1, peers_.data_bytes, total_bytes(peers_), 0};
  std::random_device random;
  hello.nonce = (static_cast<uint64_t>(random()) << 32) | random();
  fd_ = memfd_create("xtuner", MFD_CLOEXEC);
  hello.fd = fd_;
  std::string problem;
  if (fd_ >= 0 && ftruncate(fd_, hello.total_bytes) == 0) peers_.signal[rank] = map(fd_, hello.total_bytes);
  if (peers_.signal[rank]) {
    *nonce_at(peers_.signal[rank], hello.total_bytes) = hello.nonce;
  } else {
    problem = "cannot make " + std::to_string(hello.total_bytes) + " bytes of shared memory: " + last_error();
  }

  try {
    const auto hellos = all_gather(std::string(reinterpret_cast<const char*>(&hello), sizeof hello));
    if (problem.empty()) problem = map_all(hellos);
    // Whether all went well is told to all, so that either every rank has its group or none has.
    const auto problems = all_gather(problem);
    for (size_t r = 0; r < problems.size(); ++r) {
      if (!problems[r].empty()) fail("SharedMemory: rank ", r, ": ", problems[r]);
    }
  } catch (...) {
    release();
    throw;
  }
  close(fd_);  // the mappings keep the memory alive
  fd_ = -1;
}

std::string SharedMemory::map_all(const std::vector<std::string>& hellos) {
  if (static_cast<int>(hellos.size()) != peers_.world) {
    return "all_gather returned " + std::to_string(hellos.size()) + " entries for " + std::to_string(peers_.world) +
           " ranks";
  }
  for (int r = 0; r < peers_.world; ++r) {
    Hello hello;
    if (hellos[r].size() != sizeof hello) return "all_gather returned " + std::to_string(hellos[r].size()) + " bytes of rank " + std::to_string(r);
    std::memcpy(&hello, hellos[r].data(), sizeof hello);
    if (hello.data_bytes != peers_.data_bytes) {
      return "data_bytes must be the same on every rank, but is " + std::to_string(peers_.data_bytes) + " here and " +
             std::to_string(hello.data_bytes) + " on rank " + std::to_string(r);
    }
    if (r != peers_.rank && hello.fd >= 0) {
      const std::string problem = map_peer(r, hello, &peers_.signal[r]);
      if (!problem.empty()) return problem;
    }
    peers_.block[r] = static_cast<char*>(peers_.signal[r]) + signal_bytes;
  }
  return "";
}

void SharedMemory::release() {
  for (int r = 0; r < peers_.world; ++r) {
    if (peers_.signal[r]) munmap(peers_.signal[r], static_cast<size_t>(total_bytes(peers_)));
    peers_.signal[r] = nullptr;
  }
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

#else

SharedMemory::SharedMemory(int, int, int64_t, double, const AllGather&) {
  fail("SharedMemory: shared memory between ranks needs Linux (memfd, futex)");
}
std::string SharedMemory::map_all(const std::vector<std::string>&) { return ""; }
void SharedMemory::release() {}

#endif

SharedMemory::~SharedMemory() { release(); }

void* SharedMemory::allocate(int64_t bytes) {
  const int64_t begin = heap_->take(bytes, cpu::Exchange::signals(peers_, peers_.rank).epoch.load(std::memory_order_relaxed));
  if (begin < 0) {
    fail("SharedMemory: no ", bytes, " bytes free in a row among the ", peers_.data_bytes, " that rank ", peers_.rank,
         " shares with its peers; ", heap_->in_use(), " are in use");
  }
  return peers_.data(peers_.rank) + begin;
}

void SharedMemory::free(void* at) {
  const uint32_t exchange = cpu::Exchange::signals(peers_, peers_.rank).epoch.load(std::memory_order_relaxed);
  heap_->give_back(static_cast<char*>(at) - peers_.data(peers_.rank), exchange);
}

int64_t SharedMemory::allocated() const { return heap_->in_use(); }
int64_t SharedMemory::reached() const { return heap_->reached(); }

}  // namespace xt
