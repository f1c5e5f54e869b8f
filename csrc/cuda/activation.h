// SwiGLU of single values. Where it is computed, alone or behind a product, does not change a bit.
#pragma once
#include <cuda_runtime.h>

#include <limits>

#include "xtuner/ops/swiglu.h"

namespace xt::cuda {

// 1 / (1 + e^-z), relative error below 1e-6; NaN stays NaN. e^-z = 2^(hi + lo): hi = -z log2(e) is rounded, and lo is
// what the rounding lost, which exp2f alone would turn into a relative error that grows with |z|.
__device__ inline float sigmoid(float z) {
  const float log2e = 1.44269502f, log2e_rest = 1.92596303e-8f;
  float x = -z;
  x = x > 88.0f ? 88.0f : x;  // keeps the power finite
  x = x < -88.0f ? -88.0f : x;
  const float hi = x * log2e;
  const float lo = fmaf(x, log2e_rest, fmaf(x, log2e, -hi));
  const float power = exp2f(hi);
  return __fdividef(1.0f, 1.0f + fmaf(power, lo * 0.693147181f, power));
}

// The same steps in the same order as the CPU kernel.
struct Swiglu {
  float alpha, limit, up_offset;  // limit: +inf for none

  explicit Swiglu(const SwigluParams& p)
      : alpha(static_cast<float>(p.alpha)),
        limit(static_cast<float>(p.limit.value_or(std::numeric_limits<double>::infinity()))),
        up_offset(static_cast<float>(p.up_offset)) {}

  __device__ float cut_gate(float g) const { return g > limit ? limit : g; }
  __device__ float cut_up(float u) const { return u > limit ? limit : -limit > u ? -limit : u; }

  __device__ float forward(float g, float u) const {
    g = cut_gate(g);
    return g * sigmoid(alpha * g) * (cut_up(u) + up_offset);
  }
  // d(out)/d(gate) = s + alpha g s (1 - s) with s = sigmoid(alpha g), times (up + offset); d(out)/d(up) = g s.
  __device__ void backward(float dout, float g_raw, float u_raw, float& dg, float& du) const {
    float out;
    backward(dout, g_raw, u_raw, dg, du, out);
  }
  // The same, and what forward gives.
  __device__ void backward(float dout, float g_raw, float u_raw, float& dg, float& du, float& out) const {
    const float g = cut_gate(g_raw), s = sigmoid(alpha * g), gs = g * s;
    out = gs * (cut_up(u_raw) + up_offset);
    dg = g_raw > limit ? 0.0f : dout * (cut_up(u_raw) + up_offset) * fmaf(alpha * gs, 1.0f - s, s);
    du = u_raw > limit || -limit > u_raw ? 0.0f : dout * gs;
  }
};

}  // namespace xt::cuda
