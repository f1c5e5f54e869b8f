#pragma once
#include "xtuner/ops/ep_prepare.h"

namespace xt {

// Sums each token's expert rows, wherever these live: unpermute over all ranks, in one exchange, after which the others
// read y where it is: it must stay as it is until this rank has been through another exchange.
// out[t] = sum over k, in k order and in fp32, of probs[t,k] * y_p[r] with (p, r) = dest[t,k]: the same arithmetic, and
// the same bits, as unpermute on one rank that holds all experts. With probs null it is the gradient of ep_dispatch.
//   y      f32 | bf16 [R, H]   rows of this rank's experts, in this rank's data area
//   route  from ep_prepare
//   probs  f32 [T, K] or null  null: all weights are 1
//   out    as y [T, H]
// Errors: as ep_dispatch.
void ep_combine(const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor* probs, const Tensor& out,
                Stream stream);

// Gradient of ep_combine with probs, in two exchanges. (Without probs it is ep_dispatch of dout.)
//   dout    f32 | bf16 [T, H]
//   y       as dout [R, H]   in this rank's data area
//   probs   f32 [T, K]
//   dy      as dout [R, H]   out, in this rank's data area: dy[r] = probs[t,k] * dout[t] of the choice that fills row r;
//                            zero where there is none
//   dprobs  f32 [T, K]       out: <dout[t], y[row]> summed in fp32; zero where dropped
void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, Stream stream);

}  // namespace xt
