#pragma once
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt {

// Weight gradient: out[e] = beta * out[e] + a[rows of e]^T b[rows of e], fp32 accumulation.
//   a        f32 | bf16 [R, M]
//   b        as a [R, N]           with a gather [T, N]
//   offsets  i64 [E+1]             0 = offsets[0] <= ... <= offsets[E] <= R; rows past offsets[E] are never read
//   beta     0 or 1                an expert without rows: 0 writes zeros, 1 leaves out[e] untouched
//   out      f32 | bf16 [E, M, N]  with beta 0 never read
void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, double beta, const Tensor& out,
                    Stream stream, const RowGather& gather_b = {});

}  // namespace xt
