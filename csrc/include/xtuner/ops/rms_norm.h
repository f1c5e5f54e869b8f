#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Rows whose part of dweight is summed on its own.
constexpr int64_t rms_norm_block_rows = 128;

// out = (x * inverse_rms) * weight with inverse_rms = 1 / sqrt(mean(x^2) + eps) of each row, in fp32; the first product
// is rounded to x's dtype before the second, as transformers does.
//   x            f32 | bf16 [R, D], D at least 1
//   weight       as x [D]
//   out          as x [R, D]
//   inverse_rms  f32 [R]
void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& inverse_rms,
              Stream stream);

// Gradients of rms_norm; without rows dweight is zero.
//   dout, dx     as x [R, D]
//   dweight      as x [D]
//   workspace    f32 [ceil(R / rms_norm_block_rows), D], contents ignored
void rms_norm_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& inverse_rms,
                  const Tensor& dx, const Tensor& dweight, const Tensor& workspace, Stream stream);

}  // namespace xt
