// Matrix products as the CPU backend sees them, whatever op they come from:
//   out[q, v] (+)= sum_k Q[q, k] * V[v, k]
// Q is the side whose values are broadcast, V the side that fills vector registers. Swapping the two sides does not
// change a bit of the result (each product and each sum is the same), so a caller picks whichever is cheaper to pack.
#pragma once
#include <vector>

#include "xtuner/tensor.h"

namespace xt::cpu {

// Factors of a float8 side: those of line i and of block b of 128 k are data[i / lines * line + b * block].
struct GemmScale {
  const float* data = nullptr;
  int64_t lines, line, block;
};

// Element (i, k) is data[i * row + k * col]; one of the two strides is 1. With `index`, position j along the other
// dimension stands for line index[j] / divisor of the memory, and for a line of zeros where index[j] < 0. Where both
// strides are 1, lines run along v (of V) and along k (of Q).
// float8 comes without index, with col 1, zeros up to the next multiple of 128 k, and scales on both sides: the sum of
// each block of 128 k is multiplied by the product of its two scales, then added to those before.
struct GemmSide {
  const void* data;
  DType dtype;
  int64_t row;
  int64_t col;
  const int32_t* index = nullptr;
  int32_t divisor = 1;
  const void* zeros = nullptr;  // such a line; needed with `index`
  GemmScale scale = {};
};

// Element (q, v) is data[q * q_stride + v * v_stride]; one of the two strides is 1.
struct GemmOut {
  void* data;
  DType dtype;
  int64_t q_stride;
  int64_t v_stride;
  bool accumulate;  // add to what is there; else it is never read
};

// What happens to finished outputs. The features n run along v where the output's rows do (v_stride 1), else along q.
struct GemmEpilogue {
  const void* bias = nullptr;  // [n], dtype of the output; added in fp32 before the only rounding
  void* act = nullptr;         // SwiGLU of gate = out[:half], up = out[half:]; laid out like one half of the output
  int64_t half = 0;            // features of act; 0: no SwiGLU
  int64_t act_row = 0;         // from one token of act to the next
  float alpha = 1, limit = 0, up_offset = 0;

  // Instead: the output is the gradient of swiglu(gate_up), in the first halves of rows, and becomes that of gate_up,
  // as wide as these rows, while act becomes their activation. v_stride is 1.
  const void* gate_up = nullptr;
  const float* weights = nullptr;  // [tokens], of both; null: 1
  float* dots = nullptr;           // with weights: output times activation before them, [tokens, panels of V]
};

struct GemmProblem {
  GemmSide q, v;
  GemmOut out;
  int64_t num_q, num_v, num_k;  // num_k > 0
  GemmEpilogue epilogue = {};
};

// How a problem's k is cut: depends on its length and on whether there are scales, because it decides the order of
// summation. Counted in units of 32 bits as they lie in packed memory: one float, or a pair of bfloat16 where the
// processor multiplies those.
struct KBlocks {
  static constexpr int64_t longest = 256, scaled = 128;  // units, elements
  int64_t count, length;
  KBlocks(const GemmProblem& p, int64_t unit_elements) {
    const int64_t units = (p.num_k + unit_elements - 1) / unit_elements;
    const int64_t most = p.q.scale.data ? scaled / unit_elements : longest;
    count = (units + most - 1) / most;
    length = p.q.scale.data ? most : (units + count - 1) / count;
  }
};

// How a problem is cut into tiles, and how a tile is worked on. Affects speed only.
struct GemmPlan {
  int64_t q_part, v_part;         // of a tile
  int64_t blocks_per_pass;        // blocks of k worked on before the next part of V is packed
  int64_t slice;                  // rows of Q packed at a time
  int64_t packed_q_row;           // floats from one packed row of Q to the next
  int64_t packed_v, packed_q, sums;  // floats of scratch memory, in this order
  int64_t scratch() const { return packed_v + packed_q + sums; }
};

// What one thread computes in one go: out[q0:q1, v0:v1]; with SwiGLU also the same range one half further along n.
struct GemmTile {
  const GemmProblem* problem;
  const GemmPlan* plan;
  int64_t q0, q1, v0, v1;
  bool stream;  // the output is too large to stay in cache: write around it where whole lines are written once
};

GemmPlan plan_gemm(const GemmProblem& problem, double work_per_tile, int tile_rows, int tile_cols, bool pairs);

// Sums need scratch where the output cannot hold them: not fp32, or its rows run along q.
inline bool sums_in_output(const GemmOut& out) { return out.dtype == DType::f32 && out.v_stride == 1; }

// Computes all problems on at most num_threads threads.
void run_gemms(const std::vector<GemmProblem>& problems, int num_threads);

}  // namespace xt::cpu
