// Peers that are processes (or threads) of one machine.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xtuner/peers.h"

namespace xt {

namespace cpu {
class SharedHeap;
}

// Called by every rank with bytes of its own; returns those of all ranks in rank order.
using AllGather = std::function<std::vector<std::string>(const std::string&)>;

// One rank's share of a group's memory, and its view of everybody else's. Making one is collective.
//
// The memory is anonymous (memfd) and opened by the peers through /proc/<pid>/fd, so it never has a name: the kernel
// frees it when the last process that maps it is gone, however that process ended, even half way through the handshake.
// Pages are taken from the machine when first touched, so a generous size costs nothing until it is used.
class SharedMemory {
 public:
  // Errors, on every rank: a rank outside [0, world); world > max_peers; ranks that disagree about data_bytes; memory
  // that cannot be made, or that a rank cannot open (another machine or container, or another user's process).
  SharedMemory(int rank, int world, int64_t data_bytes, double timeout_s, const AllGather& all_gather);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  const Peers& peers() const { return peers_; }

  // A piece of this rank's data area, page-aligned, for tensors that other ranks reach. Its pages stay with the process
  // and are handed out again after `free`, once no other rank can still be reading them. Error when the area is full.
  void* allocate(int64_t bytes);
  void free(void* at);
  int64_t allocated() const;  // bytes handed out, or given back but still resting
  int64_t reached() const;    // bytes of the data area that have ever been handed out

 private:
  std::string map_all(const std::vector<std::string>& hellos);
  void release();

  Peers peers_;
  std::unique_ptr<cpu::SharedHeap> heap_;
  int fd_ = -1;
};

}  // namespace xt
