#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Each expert's rows times that expert's matrix, in float8: with rows r in [offsets[e], offsets[e+1]),
//   out[r, n] = sum over blocks b of 128 k, in order and in fp32, of
//               (sum of a[r, k] * b[e, n, k] over the block, in fp32) * (scale_a[b, r] * scale_b[e, n/128, b])
// which is the recipe of DeepSeek-V3 (arXiv 2412.19437, section 3.3) with all of fp32 kept inside a block, where Hopper's
// tensor cores drop the lowest bits of products before they add them. A promotion to the sum over blocks is one fused
// multiply-add where the instruction set has it.
//   a        e4m3 | e5m2 [R, K]           from quantize_1x128 or quantize_rowcol
//   scale_a  f32 [K/128, ld], ld >= R
//   b        e4m3 | e5m2 [E, N, K]        q of quantize_128x128; its qt for the data gradient
//   scale_b  f32 [E, N/128, K/128]        any strides: the scales of qt are those of q with their last dims swapped
//   offsets  i64 [E+1]                    0 = offsets[0] <= ... <= offsets[E] <= R
//   out      f32 | bf16 [R, N]            rows >= offsets[E] become zero; those rows of a and scale_a are never read
// N and K are multiples of 128. A row's bits depend on that row, b[e] and the instruction set only.
void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, Stream stream);

}  // namespace xt
