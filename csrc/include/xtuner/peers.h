// The memory through which the ranks of one group exchange rows: what the ep_* ops write into and read out of.
#pragma once
#include <cstdint>

namespace xt {

constexpr int max_peers = 64;
constexpr int64_t signal_bytes = 8192;

// Plain pointers, whoever obtained them: shared memory of processes here, peer memory over NVLink on CUDA.
// Every rank owns one signal page (zeroed before the first op) and one block of memory, both reachable by all ranks.
// A block is two index areas, then two data areas; consecutive exchanges use them in turn.
struct Peers {
  int rank = 0;
  int world = 1;
  double timeout_s = 300;   // how long an op waits for another rank before it fails
  int64_t index_bytes = 0;  // of one index area: the exchanged parts of the maps, and routing weights
  int64_t data_bytes = 0;   // of one data area: rows
  void* signal[max_peers] = {};
  void* block[max_peers] = {};

  int64_t block_bytes() const { return 2 * (index_bytes + data_bytes); }
};

}  // namespace xt
