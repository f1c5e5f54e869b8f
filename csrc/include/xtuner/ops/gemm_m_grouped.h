#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Each expert's rows times that expert's matrix, fp32 accumulation: with rows r in [offsets[e], offsets[e+1]),
//   trans_b:  out[r, n] = sum_k a[r, k] * b[e, n, k]      else:  out[r, n] = sum_k a[r, k] * b[e, k, n]
//   a        f32 | bf16 [R, Kd]
//   b        as a [E, N, Kd] when trans_b, else [E, Kd, N]
//   offsets  i64 [E+1]             0 = offsets[0] <= ... <= offsets[E] <= R
//   out      f32 | bf16 [R, N]     rows >= offsets[E] become zero; those rows of a are never read
// A row's bits depend on that row, b[e] and the instruction set only: not on other rows, R or the thread count.
void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out,
                    Stream stream);

}  // namespace xt
