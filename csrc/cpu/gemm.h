// Matrix products as the CPU backend sees them, whatever op they come from:
//   out[q, v] (+)= sum_k Q[q, k] * V[v, k]
// Q is the side whose values are broadcast, V the side that fills vector registers. Swapping the two sides does not
// change a bit of the result (each product and each sum is the same), so a caller picks whichever is cheaper to pack.
#pragma once
#include <vector>

#include "xtuner/tensor.h"

namespace xt::cpu {

// Element (i, k) is data[i * row + k * col]; one of the two strides is 1.
struct GemmSide {
  const void* data;
  DType dtype;
  int64_t row;
  int64_t col;
};

// Element (q, v) is data[q * q_stride + v * v_stride]; one of the two strides is 1.
struct GemmOut {
  void* data;
  DType dtype;
  int64_t q_stride;
  int64_t v_stride;
  bool accumulate;  // add to what is there; else it is never read
};

struct GemmProblem {
  GemmSide q, v;
  GemmOut out;
  int64_t num_q, num_v, num_k;  // num_k > 0
};

// How a problem's k is cut: depends on num_k alone, because it decides the order of summation.
struct KBlocks {
  static constexpr int64_t longest = 256;
  int64_t count, length;
  explicit KBlocks(int64_t num_k) : count((num_k + longest - 1) / longest), length((num_k + count - 1) / count) {}
};

// What one thread computes in one go: out[q0:q1, v0:v1].
struct GemmTile {
  const GemmProblem* problem;
  int64_t q0, q1, v0, v1;
};

// Floats of scratch memory a tile needs, in three parts.
struct GemmScratchSize {
  int64_t packed_v, packed_q, sums;
  int64_t total() const { return packed_v + packed_q + sums; }
};

// k blocks of V that are packed at a time for a tile with `v_cols` columns (rounded up to whole panels).
int64_t k_blocks_per_pass(const KBlocks& blocks, int64_t v_cols);

// Sums need scratch where the output cannot hold them: not fp32, or its rows run along q.
inline bool sums_in_output(const GemmOut& out) { return out.dtype == DType::f32 && out.v_stride == 1; }

// Computes all problems on at most num_threads threads.
void run_gemms(const std::vector<GemmProblem>& problems, int num_threads);

}  // namespace xt::cpu
