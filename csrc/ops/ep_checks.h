// Argument checks that the expert-parallel ops have in common.
#pragma once
#include "ops/checks.h"
#include "xtuner/ops/ep_prepare.h"

namespace xt {

// GPUs move rows in accesses of 16 bytes, and show each other two tensors at most.
inline void check_peers(const ArgChecker& check, const Peers& peers) {
  if (check.device().type != DeviceType::cuda) return;
  bool aligned = peers.index_bytes % 16 == 0 && peers.index_bytes >= 64;
  for (int r = 0; r < peers.world; ++r) {
    aligned = aligned && reinterpret_cast<uintptr_t>(peers.block[r]) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(peers.signal[r]) % 64 == 0;
  }
  check.require(aligned, "on a GPU, blocks of peers must start at multiples of 16 bytes, signal pages at multiples of 64, "
                "and index areas be a multiple of 16 bytes, at least 64");
}

inline void check_counts(ArgChecker& check, const Tensor& counts, const Peers& peers) {
  check.require(peers.world >= 1 && peers.world <= max_peers && peers.rank >= 0 && peers.rank < peers.world,
                "peers must have a rank in [0, world) and a world in [1, ", max_peers, "], got rank ", peers.rank,
                " of ", peers.world);
  check.tensor("counts", counts, {DType::i32}, {{"W", peers.world}, {"E"}});
  check.require(counts.shape[1] % peers.world == 0 && counts.shape[1] > 0,
                "the number of experts must be a positive multiple of the ", peers.world, " ranks, got ",
                counts.shape[1]);
  check_peers(check, peers);
}

inline void check_route(ArgChecker& check, const EpRoute& route, const Peers& peers, int64_t num_tokens) {
  check_counts(check, route.counts, peers);
  check.tensor("dest", route.dest, {DType::i32}, {{"T", num_tokens}, {"K"}, {"2", 2}});
}

// Rows that other ranks reach.
inline void check_shared(ArgChecker& check, const char* name, const Tensor& rows, const Peers& peers) {
  const int64_t bytes = rows.numel() * size_of(rows.dtype);
  check.require(bytes == 0 || peers.owns(rows.data, bytes), name, " must lie in the memory that rank ", peers.rank,
                " shares with its peers");
}

}  // namespace xt
