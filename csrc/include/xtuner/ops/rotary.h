#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Turns feature i of each head together with feature i + D/2, in fp32:
//   out[i] = x[i] cos - x[i + D/2] sin,  out[i + D/2] = x[i + D/2] cos + x[i] sin
// `back` turns the other way, which is the gradient.
//   x, out    f32 | bf16 [T, H, D], D even
//   cos, sin  as x [T, D/2]
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, const Tensor& out, Stream stream);

}  // namespace xt
