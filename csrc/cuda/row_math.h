// Weighted sums of rows and products with them, in fp32, by one warp.
#pragma once
#include "cuda/rows.h"

namespace xt::cuda {

__device__ inline float prob_of(const float* probs, int64_t choice) { return probs ? __ldg(probs + choice) : 1.0f; }

// This lane's part of sum over the choices [first, last), in their order, of probs[choice] * row of the choice.
// row_of(choice) is where that row begins, or null where it is dropped. The rows of `batch` choices are in flight together.
template <class T, int N, int per_lane, class RowOf>
__device__ void sum_choices(const RowOf& row_of, const float* probs, int64_t first, int64_t last, int64_t begin, int left,
                            float (*sum)[N]) {
  using A = Access<T, N>;
  constexpr int batch = 4;
  for (int64_t choice = first; choice < last; choice += batch) {
    const typename A::Bits* row[batch];
    float p[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      row[b] = choice + b < last ? row_of(choice + b) : nullptr;
      p[b] = row[b] ? prob_of(probs, choice + b) : 0.0f;
    }
    typename A::Bits bits[batch][per_lane] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
#pragma unroll
      for (int j = 0; j < per_lane; ++j) {
        if (row[b] && j * warp_size < left) bits[b][j] = __ldg(row[b] + begin + j * warp_size);
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (!row[b]) continue;
#pragma unroll
      for (int j = 0; j < per_lane; ++j) {
        float v[N];
        A::widen(bits[b][j], v);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[j][n] = fmaf(p[b], v[n], sum[j][n]);
      }
    }
  }
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) v += __shfl_xor_sync(all_lanes, v, step);
  return v;
}

// dy row = p * dout row, and with `y` its dot product with dout. Returns this lane's part of the product.
template <class T, int N>
__device__ float scale_and_dot(const typename Access<T, N>::Bits* __restrict__ dout,
                               const typename Access<T, N>::Bits* __restrict__ y,
                               typename Access<T, N>::Bits* __restrict__ dy, int64_t units, float p) {
  using A = Access<T, N>;
  constexpr int ahead = 4;
  float dot[ahead] = {};
  for (int64_t begin = lane(); begin < units; begin += ahead * warp_size) {
    const int left = static_cast<int>(min(units - begin, int64_t{ahead * warp_size}));
    typename A::Bits d[ahead] = {}, r[ahead] = {};
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (j * warp_size >= left) continue;
      d[j] = __ldg(dout + begin + j * warp_size);
      if (y) r[j] = __ldg(y + begin + j * warp_size);
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      float dv[N], rv[N];
      A::widen(d[j], dv);
      A::widen(r[j], rv);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dot[j] = fmaf(dv[n], rv[n], dot[j]);
        dv[n] *= p;
      }
      if (j * warp_size < left) dy[begin + j * warp_size] = A::narrow(dv);
    }
  }
  return (dot[0] + dot[1]) + (dot[2] + dot[3]);
}

}  // namespace xt::cuda
