// Argument checks that the expert-parallel ops have in common.
#pragma once
#include "ops/checks.h"
#include "xtuner/ops/ep_prepare.h"

namespace xt {

inline void check_counts(ArgChecker& check, const Tensor& counts, const Peers& peers) {
  check.require(peers.world >= 1 && peers.world <= max_peers && peers.rank >= 0 && peers.rank < peers.world,
                "peers must have a rank in [0, world) and a world in [1, ", max_peers, "], got rank ", peers.rank,
                " of ", peers.world);
  check.tensor("counts", counts, {DType::i32}, {{"W", peers.world}, {"E"}});
  check.require(counts.shape[1] % peers.world == 0 && counts.shape[1] > 0,
                "the number of experts must be a positive multiple of the ", peers.world, " ranks, got ",
                counts.shape[1]);
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
