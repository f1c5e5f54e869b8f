#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Weight gradient in float8: out[e, m, n] = beta * out[e, m, n] + sum over the blocks of 128 tokens of expert e, in order
// and in fp32, of (sum of a[m, t] * b[n, t] over the block, in fp32) * (scale_a[block, m] * scale_b[block, n]).
// Arithmetic as in gemm_m_grouped_fp8.
//   a        e4m3 | e5m2 [M, P]   qt of quantize_rowcol: expert e's columns start where those of e - 1, padded to a
//                                 multiple of 128, end; padding holds zeros
//   scale_a  f32 [P/128, M]       its scale_t
//   b        e4m3 | e5m2 [N, P]   likewise
//   scale_b  f32 [P/128, N]
//   offsets  i64 [E+1]            of the rows before padding; the padded rows of all experts must fit into P
//   beta     0 or 1               an expert without rows: 0 writes zeros, 1 leaves out[e] untouched
//   out      f32 | bf16 [E, M, N] with beta 0 never read
// M, N and P are multiples of 128.
void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, double beta, const Tensor& out, Stream stream);

}  // namespace xt
