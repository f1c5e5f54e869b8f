#pragma once
#include "xtuner/ops/ep_prepare.h"

namespace xt {

// Brings each token to the rows of its experts, wherever these live: permute over all ranks, in one exchange.
//   x           f32 | bf16 | e4m3 | e5m2 [T, H]
//   scales      f32 [S, ld] or null   scales[s, t] travels with token t, ld >= T (quantize_1x128); on all ranks or none
//   route       from ep_prepare
//   out         as x [R, H]           out: rows of this rank's experts; zero where origin is INT32_MIN
//   out_scales  f32 [S, ld'] or null  out: ld' >= R; columns of no row become zero
// A row crosses to another rank at most once and is multiplied there.
// Errors: a receive buffer (of any rank) too small for the tokens that come to it, naming rank and sizes, on every rank;
// a map that does not fit; a rank that does not come within peers.timeout_s, naming it, the exchange and the counts.
void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream);

}  // namespace xt
