// Grouped products by plain multiply-adds: what float32, bfloat16 and float8 have in common. A block of 16 x 16 threads
// computes a tile, each thread 4 x 4 outputs that are 16 rows and columns apart.
#pragma once
#include "cuda/gemm.h"
#include "cuda/rows.h"

namespace xt::cuda::simple {

constexpr int tile = 64, depth = 16;  // of m and n, of k
constexpr int side = 16;
constexpr int each = tile / side;
static_assert(side * side == block_threads);

using Sums = float[each][each];
using Stage = float[depth][tile + 1];  // of one operand, in shared memory

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }

__device__ inline void add_products(const Stage& a, const Stage& b, Sums& sums) {
  const int ti = threadIdx.x / side, tj = threadIdx.x % side;
  for (int k = 0; k < depth; ++k) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
#pragma unroll
      for (int j = 0; j < each; ++j) sums[i][j] = fmaf(a[k][ti + i * side], b[k][tj + j * side], sums[i][j]);
    }
  }
}

// out[row + i, col + j] for i < rows, j < cols.
__device__ inline void store(const Epilogue& e, const Sums& sums, int64_t expert, bool unused, int64_t row, int64_t rows,
                             int64_t col) {
  const int ti = threadIdx.x / side, tj = threadIdx.x % side;
#pragma unroll
  for (int i = 0; i < each; ++i) {
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int64_t r = row + ti + i * side, c = col + tj + j * side;
      if (ti + i * side >= rows || c >= e.num_n) continue;
      float x = sums[i][j];
      if (e.out_f32) {
        float* to = static_cast<float*>(e.out) + r * e.num_n + c;
        if (e.bias && !unused) x += static_cast<const float*>(e.bias)[expert * e.num_n + c];
        *to = e.accumulate ? *to + x : x;
      } else {
        bf16_t* to = static_cast<bf16_t*>(e.out) + r * e.num_n + c;
        if (e.bias && !unused) x += widen(static_cast<const bf16_t*>(e.bias)[expert * e.num_n + c]);
        if (e.accumulate) x = widen(*to) + x;
        *to = Access<bf16_t, 1>::narrow(&x);
      }
    }
  }
}

}  // namespace xt::cuda::simple
