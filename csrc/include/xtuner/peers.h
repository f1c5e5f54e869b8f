// The memory through which the ranks of one group exchange rows: what the ep_* ops write into and read out of.
#pragma once
#include <cstdint>

namespace xt {

constexpr int max_peers = 64;
constexpr int64_t signal_bytes = 8192;

// Plain pointers, whoever obtained them: shared memory of processes here, peer memory over NVLink on CUDA.
// Every rank owns one signal page (zeroed before the first op) and one block of memory, both reachable by all ranks.
// A block is two index areas, which consecutive exchanges use in turn, then the data area, where the tensors live that
// other ranks write to or read from. Where in it, each rank decides for itself.
struct Peers {
  int rank = 0;
  int world = 1;
  double timeout_s = 300;   // how long an op waits for another rank before it fails
  int64_t index_bytes = 0;  // of one index area: loads of experts, places of tensors
  int64_t data_bytes = 0;   // of the data area: rows
  void* signal[max_peers] = {};
  void* block[max_peers] = {};

  int64_t block_bytes() const { return 2 * index_bytes + data_bytes; }
  char* data(int r) const { return static_cast<char*>(block[r]) + 2 * index_bytes; }
  // Whether [at, at + bytes) is in this rank's own data area.
  bool owns(const void* at, int64_t bytes) const {
    const char* p = static_cast<const char*>(at);
    return block[rank] && p >= data(rank) && bytes <= data_bytes && p - data(rank) <= data_bytes - bytes;
  }
};

}  // namespace xt
