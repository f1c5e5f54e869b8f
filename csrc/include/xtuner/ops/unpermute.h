#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Sums each token's expert rows: out[t] = sum over k, in k order and in fp32, of probs[t,k] * y[row_of[t,k]].
//   y       f32 | bf16 [R, H]
//   row_of  i32 [T, K]          from route_map; -1 (dropped) adds nothing; on a GPU values outside [-1, R) are taken for
//                               -1, with a fault
//   probs   f32 [T, K] or null  null: all weights are 1
//   out     as y [T, H]
void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, Stream stream);

// Gradient of unpermute.
//   dout    f32 | bf16 [T, H]
//   y       as dout [R, H] or null   needed when dprobs is wanted
//   src     i32 [R]                  the inverse of row_of: src[row_of[t,k]] == t*K + k, -1 on rows that nobody owns; where
//                                    it is not, on a GPU, the choice counts as dropped and the row as nobody's, with a fault
//   row_of  i32 [T, K]
//   probs   f32 [T, K] or null
//   dy      as dout [R, H]           out: dy[row_of[t,k]] = probs[t,k] * dout[t]; zero where src == -1
//   dprobs  f32 [T, K] or null       out: <dout[t], y[row_of[t,k]]> summed in fp32; zero where dropped
void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, Stream stream);

}  // namespace xt
