// The part of each CPU kernel that is compiled once per instruction set, behind a table of functions.
#pragma once
#include <cstdint>

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "xtuner/ops/swiglu.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

struct SwigluRows {
  DType dtype;
  int64_t width;  // I
  int64_t row, up;  // forward: elements from one row of x to the next, and from a row's gates to its ups
  const void* x;  // [rows, 2I]
  const void* dout;  // [rows, I]; backward only
  void* out;  // forward [rows, I], backward dx [rows, 2I]
  float alpha;
  float limit;  // +inf: none
  float up_offset;
};

SwigluRows swiglu_rows_of(const Tensor& x, const SwigluParams& params);  // all but dout and out

struct RmsNormRows {
  DType dtype;
  int64_t width;  // D
  const void* x;  // [rows, D]
  const void* weight;  // [D]
  const void* dout;  // [rows, D]; backward only
  void* out;  // forward [rows, D], backward dx
  float* inverse_rms;  // [rows]; written by forward
  float eps;
};

struct RotaryTokens {
  DType dtype;
  int64_t num_heads, half;
  const void* x;  // [tokens, num_heads, 2 * half]
  const void *cos, *sin;  // [tokens, half]
  void* out;  // as x
  bool back;
};

struct CrossEntropyRows {
  DType dtype;
  int64_t vocab;
  void* logits;  // [tokens, vocab]; becomes the gradient
  const int64_t* labels;
  const float* weights;
  float* losses;
  bool gradient;
};

struct TopkSoftmaxTokens {
  int64_t num_experts, num_experts_per_tok;  // E, K
  bool normalise;
  const float* logits;  // [T, E]
  const float* choice_bias;  // [E] or null
  const int64_t* given;  // [T, K] or null
  float* weights;  // [T, K]
  int64_t* idx;  // [T, K]
  float* probs;  // [T, E]
  float* logsumexp;  // [T]
};

struct TopkSoftmaxGradient {
  int64_t num_experts, num_experts_per_tok;
  bool normalise;
  const float* dweights;  // [T, K] or null
  const float* dprob_sum;  // [E] or null
  float dz_sum;
  const float *probs, *logsumexp;
  const int64_t* idx;
  float* dlogits;  // [T, E]
};

struct UnpermuteRows {
  DType dtype;
  int64_t hidden;  // H
  int64_t num_experts_per_tok;  // K
  const int32_t* row_of;  // [T, K]
  const float* probs;  // [T, K] or null
  const void* y;  // [R, H]; backward: null unless dprobs is wanted
  void* out;  // forward [T, H]
  const void* dout;  // backward [T, H]
  void* dy;  // backward [R, H]
  float* dprobs;  // backward [T, K] or null
  bool stream;  // write out or dy past the cache; needs 64-byte aligned rows
  bool far;  // forward: y lies beyond the caches
};

struct ScaleRule {
  float eps;
  bool power_of_two;
};

struct QuantizeRows {
  DType from, to;
  ScaleRule rule;
  int64_t hidden;  // H
  const void* x;  // [rows, H]
  void* q;  // [rows, H]
  float* scale;  // of row r and block b: scale[b * scale_row + r]
  int64_t scale_row;
  bool stream;  // write q past the caches; it is aligned to 64 bytes
};

// 128 columns of up to 128 rows.
struct QuantizeTile {
  DType from, to;
  ScaleRule rule;
  int64_t num_rows;
  int64_t row;  // elements from one row of q to the next
  int64_t x_row;  // likewise of x
  const void* x;
  const void* later;  // the x of a tile soon to come, or null
  void* q;
  void* qt;  // [128, 128], rows past num_rows of x become zero
  int64_t qt_row;
  float* scale;  // [num_rows] when scale_t is given, else one
  float* scale_t;  // [128] or null
  bool stream;  // write q and qt past the caches; they are aligned to 64 bytes
};

struct DequantizeRows {
  DType from, to;
  int64_t hidden;
  const void* q;
  void* x;
  const float* scale;  // of row r and block b: scale[r / rows_per_scale * scale_row + b * scale_col]
  int64_t rows_per_scale, scale_row, scale_col;
};

// The rows of unpermute when they lie in the memory of several ranks; stands for y and row_of.
struct PeerTable {
  const int32_t* dest;      // [T, K, 2]: rank and row of each choice; rank -1: dropped
  const void* const* base;  // [W]: row 0 of each rank
};

// One row of the gradient of unpermute: out = p * x, and <x, b>. Asks for next_b on the way.
struct ScaleAndDot {
  DType dtype;
  bool stream;
  int64_t hidden;
  float p;
  const void *x, *b, *next_b;
  void* out;
};

using GemmTileFn = void (*)(const GemmTile&, float* scratch);

// Kernels for rows [begin, end) (tokens, for unpermute).
struct Kernels {
  const char* name;
  void (*swiglu)(const SwigluRows&, int64_t begin, int64_t end);
  void (*swiglu_bwd)(const SwigluRows&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormRows&, int64_t begin, int64_t end);
  void (*rms_norm_bwd)(const RmsNormRows&, int64_t begin, int64_t end, float* dweight);  // dweight: of these rows
  void (*rotary)(const RotaryTokens&, int64_t begin, int64_t end);
  void (*cross_entropy)(const CrossEntropyRows&, int64_t begin, int64_t end);
  void (*topk_softmax)(const TopkSoftmaxTokens&, int64_t begin, int64_t end, float* sums);  // sums: of these tokens
  void (*topk_softmax_bwd)(const TopkSoftmaxGradient&, int64_t begin, int64_t end);
  void (*unpermute)(const UnpermuteRows&, int64_t begin, int64_t end);
  void (*unpermute_bwd)(const UnpermuteRows&, int64_t begin, int64_t end);
  void (*quantize_rows)(const QuantizeRows&, int64_t begin, int64_t end);
  void (*quantize_tile)(const QuantizeTile&);
  void (*dequantize_rows)(const DequantizeRows&, int64_t begin, int64_t end);
  void (*unpermute_peers)(const UnpermuteRows&, const PeerTable&, int64_t begin, int64_t end);
  // Single rows. After streaming ones, fence() before anybody else is told to read them.
  void (*copy_row)(bool stream, const void* x, void* out, int64_t bytes);
  float (*scale_and_dot)(const ScaleAndDot&);
  void (*fence)();
  int tile_rows, tile_cols;  // the block of outputs that the GEMM keeps in registers: q x v
  GemmTileFn gemm_tile_f32, gemm_tile_bf16;  // by the dtype of the operands
  bool gemm_pairs_bf16;  // gemm_tile_bf16 multiplies pairs of bfloat16: units of two elements
  // Floats of scratch for tasks of at most `rows` rows (queries times query heads per key head), and one task.
  int64_t (*attention_scratch)(const AttentionProblem&, int64_t rows);
  void (*attention)(const AttentionProblem&, const AttentionTask&, float* scratch);
  int64_t (*attention_bwd_scratch)(const AttentionProblem&, int64_t rows);
  void (*attention_bwd)(const AttentionProblem&, const AttentionTask&, float* scratch);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// Puts what this instruction set does better into a table of AVX-512.
void use_avx512bf16(Kernels& k);

// The table in use: the best one this machine can run, unless force_isa() says otherwise.
const Kernels& kernels();

}  // namespace xt::cpu
