#pragma once
#include "xtuner/peers.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Expert parallelism over W ranks: expert e of E lives on rank e / (E/W). On its owner, the rows of an expert are ordered
// by source rank, then token, then k: the order that one rank holding everybody's tokens would have.
//
// The routing of one layer, as seen from one rank: T its own tokens, R the rows that come to its own experts. A token
// travels once to each rank that has experts of it, into a numbered place of that rank's receive buffer; tokens whose
// expert is at home do not travel.
struct EpRoute {
  Tensor counts;  // i32 [W, E]     choices of rank s that go to expert e
  Tensor tokens;  // i32 [W, W]     tokens that travel from rank s to rank p; 0 where p == s
  Tensor dest;    // i32 [T, K, 2]  rank and row of each choice of this rank, (-1, -1) where dropped
  Tensor slot;    // i32 [T, W]     place of this rank's token t in the receive buffer of rank p; -1: does not travel there
  Tensor origin;  // i32 [R]        where each row comes from: a place >= 0 in the receive buffer, or this rank's token t
                  //                as -1 - t, or INT32_MIN: from nowhere (a row >= offsets[E/W])
};

// One exchange of all ranks, in which they tell each other how many rows each expert gets from whom.
//   topk_idx  i32 | i64 [T, K]   expert of each choice in [0, E), or -1: dropped. T may differ between ranks
//   counts, tokens, dest, slot   out, see EpRoute
//   offsets   i64 [E/W + 1]      out: first row of each expert of this rank; offsets[E/W] rows are used
// Errors: an index outside [-1, E) (names token, k and value); E not a multiple of W; T*K above what an index area holds;
// a rank that does not come within peers.timeout_s.
void ep_prepare(const Tensor& topk_idx, const Peers& peers, const Tensor& counts, const Tensor& tokens,
                const Tensor& dest, const Tensor& slot, const Tensor& offsets, Stream stream);

// The rest of the map, once offsets has told how many rows there are. No waiting. Must directly follow ep_prepare.
//   counts, tokens, offsets      from ep_prepare
//   origin    i32 [R]            out
// Errors: R < offsets[E/W], naming both.
void ep_prepare_rows(const Peers& peers, const Tensor& counts, const Tensor& tokens, const Tensor& offsets,
                     const Tensor& origin, Stream stream);

// The data_bytes that peers need for any ep_* op on this route with rows of row_bytes: the same on all ranks.
int64_t ep_room(const Tensor& counts, const Tensor& tokens, int64_t row_bytes);

}  // namespace xt
