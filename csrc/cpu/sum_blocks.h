// The last step of sums over rows that many threads share.
#pragma once
#include "cpu/simd/bf16.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

// out[i] = the sum of the blocks' parts [blocks, width], in their order.
inline void sum_blocks(const Tensor& parts, const Tensor& out) {
  const int64_t width = parts.shape[1];
  for (int64_t i = 0; i < width; ++i) {
    float total = 0;
    for (int64_t b = 0; b < parts.shape[0]; ++b) total += parts.ptr<float>()[b * width + i];
    if (out.dtype == DType::f32) {
      out.ptr<float>()[i] = total;
    } else {
      out.ptr<bf16_t>()[i] = narrow(total);
    }
  }
}

}  // namespace xt::cpu
