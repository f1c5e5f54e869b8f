#pragma once
#include <optional>

#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

struct SwigluParams {
  double alpha = 1.0;           // slope inside the sigmoid
  std::optional<double> limit;  // > 0: gate = min(gate, limit), up = clamp(up, -limit, limit)
  double up_offset = 0.0;       // added to up
};

// out = gate * sigmoid(alpha * gate) * (up + up_offset) with gate = x[:, :I], up = x[:, I:], computed in fp32.
//   x        f32 | bf16 [R, 2I]
//   offsets  i64 [E+1] or null   rows >= offsets[E] become zero and are never read; null: all R rows count.
//                                On a GPU only offsets[E] is looked at, and cut to [0, R] with a fault
//   out      as x [R, I]
void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, Stream stream);

// Gradient of swiglu; where a limit cuts a value off its gradient is zero (at the limit itself it passes).
//   dout f32 | bf16 [R, I], x as dout [R, 2I], dx as dout [R, 2I]
void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, Stream stream);

}  // namespace xt
