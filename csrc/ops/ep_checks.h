// Argument checks that the expert-parallel ops have in common.
#pragma once
#include "ops/checks.h"
#include "xtuner/ops/ep_prepare.h"

namespace xt {

inline void check_loads(ArgChecker& check, const Tensor& counts, const Tensor& tokens, const Peers& peers) {
  check.require(peers.world >= 1 && peers.world <= max_peers && peers.rank >= 0 && peers.rank < peers.world,
                "peers must have a rank in [0, world) and a world in [1, ", max_peers, "], got rank ", peers.rank,
                " of ", peers.world);
  check.tensor("counts", counts, {DType::i32}, {{"W", peers.world}, {"E"}});
  check.tensor("tokens", tokens, {DType::i32}, {{"W", peers.world}, {"W", peers.world}});
  check.require(counts.shape[1] % peers.world == 0 && counts.shape[1] > 0,
                "the number of experts must be a positive multiple of the ", peers.world, " ranks, got ",
                counts.shape[1]);
}

inline void check_route(ArgChecker& check, const EpRoute& route, const Peers& peers, int64_t num_tokens,
                        int64_t num_rows) {
  check_loads(check, route.counts, route.tokens, peers);
  check.tensor("dest", route.dest, {DType::i32}, {{"T", num_tokens}, {"K"}, {"2", 2}});
  check.tensor("slot", route.slot, {DType::i32}, {{"T", num_tokens}, {"W", peers.world}});
  check.tensor("origin", route.origin, {DType::i32}, {{"R", num_rows}});
}

}  // namespace xt
