#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// rms_norm of each head, then rotary, with the bits of the two one after the other and half their traffic.
//   x            f32 | bf16 [T, H, D], D even and at least 2
//   weight       as x [D]
//   cos, sin     as x [T, D/2]
//   out          as x [T, H, D]
//   inverse_rms  f32 [T, H]
void rms_norm_rotary(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps,
                     const Tensor& out, const Tensor& inverse_rms, Stream stream);

// Gradients of rms_norm_rotary; without heads dweight is zero.
//   dout, dx     as x [T, H, D]
//   dweight      as x [D]
//   workspace    f32 [ceil(T * H / rms_norm_block_rows), D], contents ignored
void rms_norm_rotary_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& cos,
                         const Tensor& sin, const Tensor& inverse_rms, const Tensor& dx, const Tensor& dweight,
                         const Tensor& workspace, Stream stream);

}  // namespace xt
