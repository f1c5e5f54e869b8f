#pragma once
#include "xtuner/ops/ep_prepare.h"

namespace xt {

// Brings each token to the rows of its experts, wherever these live: permute over all ranks. Each rank writes its tokens
// straight into the rows of the others: one exchange tells where these are, a second that they are there.
//   x           f32 | bf16 | e4m3 | e5m2 [T, H]
//   scales      f32 [S, ld] or null   scales[s, t] travels with token t, ld >= T (quantize_1x128); on all ranks or none
//   route       from ep_prepare
//   out         as x [R, H]           out, in this rank's data area: rows of its experts; zero from offsets[E/W] on
//   out_scales  f32 [S, ld'] or null  out, likewise: ld' >= R; columns of no row become zero
// Errors: out outside the data area; a map that points outside the rows of its rank; a rank that does not come within
// peers.timeout_s, naming it, the exchange and the counts.
void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream);

}  // namespace xt
