#pragma once
#include "xtuner/ops/swiglu.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

struct DswigluOptions {
  SwigluParams swiglu;
  // The three come together or not at all.
  const Tensor* weights = nullptr;    // f32 [R]: of each row's result; null: all are 1
  const Tensor* dweights = nullptr;   // f32 [R], out
  const Tensor* workspace = nullptr;  // f32 [gemm_m_grouped_dswiglu_workspace_size()]; what it held does not matter
};

// Backward of the second half of an expert, y[r] = weights[r] * (b[e] a[r]) with a = swiglu(x), in one pass over x. With
// rows r in [offsets[e], offsets[e+1]) and g[r, i] = sum_d dy[r, d] * b[e, d, i], summed in fp32 and rounded as dy:
//   dx[r]       = gradient of swiglu at x[r] for weights[r] * g[r]
//   act[r]      = weights[r] * a[r]             so that the gradient of b[e] is the sum of dy[r] act[r]^T
//   dweights[r] = sum_i g[r, i] * a[r, i]       in fp32
//   dy       f32 | bf16 [R, D], D > 0
//   b        as dy [E, D, I]
//   offsets  i64 [E+1]     0 = offsets[0] <= ... <= offsets[E] <= R
//   x        as dy [R, 2I] gate, then up, as gemm_m_grouped left them
//   dx       as dy [R, 2I]
//   act      as dy [R, I]
// Outputs become zero in rows >= offsets[E], which are never read. Without weights dx and act have the bits of
// swiglu_bwd(gemm_m_grouped(dy, b, offsets, trans_b = false), x) and of swiglu(x).
void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x, const Tensor& dx,
                            const Tensor& act, Stream stream, const DswigluOptions& options = {});

// In floats, on the device of x; needed with weights only.
int64_t gemm_m_grouped_dswiglu_workspace_size(const Tensor& x);

}  // namespace xt
