#pragma once
#include "xtuner/peers.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Expert parallelism over W ranks: expert e of E lives on rank e / (E/W). On its owner, the rows of an expert are ordered
// by source rank, then token, then k: the order that one rank holding everybody's tokens would have.
//
// The routing of one layer, as seen from one rank with T tokens.
struct EpRoute {
  Tensor counts;  // i32 [W, E]     choices of rank s that go to expert e
  Tensor dest;    // i32 [T, K, 2]  rank and row of each choice of this rank, (-1, -1) where dropped
};

// One exchange of all ranks, in which they tell each other how many rows each expert gets from whom.
//   topk_idx  i32 | i64 [T, K]   expert of each choice in [0, E), or -1: dropped. T may differ between ranks
//   capacity  rows R of this rank, from which on choices are dropped; < 0: there is no bound. May differ between ranks
//   counts    out: before anything is dropped for want of room
//   dest      out
//   offsets   i64 [E/W + 1]      out: first row of each expert of this rank; offsets[E/W] <= R rows are used
// Errors: an index outside [-1, E) (names token, k and value); E not a multiple of W; more experts than an index area
// holds; a rank that does not come within peers.timeout_s.
//   workspace  i32 [n]           n >= ep_prepare_workspace_size; null where that is 0
//
// On a GPU, no ep_* op can throw for a value: a choice or row that is out of range is skipped, a rank that does not come
// ends all waiting of this rank, and either is noted in stream.fault. There, peers' blocks start at multiples of 16 bytes
// and signal pages at multiples of 64.
void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, Stream stream, const Tensor* workspace = nullptr);
int64_t ep_prepare_workspace_size(int64_t num_choices, int64_t num_experts, DeviceType device);

}  // namespace xt
