#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Copies each token to the rows of its experts: out[r] = x[src[r] / num_experts_per_tok], zero where src[r] == -1.
//   x    f32 | bf16 [T, H]
//   src  i32 [R]            from route_map, in [-1, T * num_experts_per_tok)
//   out  as x [R, H]
void permute(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& out, Stream stream);

}  // namespace xt
