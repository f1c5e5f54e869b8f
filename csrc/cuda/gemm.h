// What the kernels of grouped products share: their operands, and one launcher per kind of GPU. Each launcher takes any
// problem that its comment admits; the ops' entry points pick one.
#pragma once
#include "cuda/activation.h"
#include "cuda/launch.h"
#include "cuda/tile_scheduler.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::cuda {

// Which line of an operand in memory stands for row r: line r, or as a RowGather says.
struct RowMap {
  const int32_t* src = nullptr;  // null: no map
  int64_t per_token = 1, lines = 0;

  static RowMap of(const RowGather& gather, int64_t lines) {
    if (!gather.src) return {};
    return {gather.src->ptr<int32_t>(), gather.num_experts_per_tok, lines};
  }

  // -1: a line of zeros.
  __device__ int64_t line(int64_t row, uint64_t* fault) const {
    if (!src) return row;
    const int32_t choice = __ldg(src + row);
    if (choice == -1) return -1;
    const int64_t line = static_cast<uint32_t>(choice) / static_cast<uint32_t>(per_token);
    if (choice >= 0 && line < lines) return line;
    note(fault, Fault::gemm_src, row);
    return -1;
  }
};

// What becomes of finished sums.
struct Epilogue {
  void* out;         // rows of num_n
  bool out_f32;      // else bfloat16; bias and act likewise
  int64_t num_n;
  bool accumulate;   // add to what is in out
  const void* bias;  // [E, num_n] or null
  void* act;         // rows of num_n / 2, or null
  Swiglu swiglu;
  // With gate_up, [R, num_n], the product is the gradient of swiglu(gate_up): out is that of gate_up.
  const void* gate_up = nullptr;
  const float* weights = nullptr;  // [R], of product and act, or null
  float* dots = nullptr;           // with weights: parts of the rows' dot products of product and act, [R, dot_parts]
  int64_t dot_parts = 0;
};

// out[r, n] = sum_k a[r, k] b[e, n, k], with trans_b, else b[e, k, n].
struct MGrouped {
  const void *a, *b;
  const int64_t* offsets;
  int64_t experts, rows, n, k;
  bool trans_b;
  RowMap map;  // of a
  Epilogue epilogue;
  uint64_t* fault;

  // Columns of gate and of up share tiles.
  XT_BOTH bool paired() const { return epilogue.act && !epilogue.gate_up; }
};

// out[e, m, n] = sum over the rows r of expert e of a[r, m] b[r, n].
struct KGrouped {
  const void *a, *b;
  const int64_t* offsets;
  int64_t experts, rows, m, n;
  RowMap map;  // of b
  Epilogue epilogue;
  uint64_t* fault;
};

// float32 or bfloat16, any sizes; act is left to the caller. Plain multiply-adds: for correctness rather than speed.
void simple_m_grouped(const MGrouped& g, DType dtype, Stream stream);
void simple_k_grouped(const KGrouped& g, DType dtype, Stream stream);

namespace sm80 {  // bfloat16; every row of every operand and of each half of b starts at a multiple of 16 bytes
void gemm_m_grouped(const MGrouped& g, int multiprocessors, Stream stream);
void gemm_k_grouped(const KGrouped& g, int multiprocessors, Stream stream);
// b is not transposed and the epilogue has gate_up, all in bfloat16; a dot product is in parts of so many columns.
constexpr int dot_columns = 64;
void gemm_m_grouped_dswiglu(const MGrouped& g, int multiprocessors, Stream stream);
}  // namespace sm80

namespace sm90 {  // as for sm80, with at least one expert, k > 0 and sizes below 2^31
void gemm_m_grouped(const MGrouped& g, int multiprocessors, Stream stream);
void gemm_k_grouped(const KGrouped& g, int multiprocessors, Stream stream);
constexpr int dot_columns = 128;
void gemm_m_grouped_dswiglu(const MGrouped& g, int multiprocessors, Stream stream);
}  // namespace sm90

// By all threads of the first block: notes what is wrong with the offsets, which are cut to what is right (RowRanges).
__device__ inline void check_offsets(const int64_t* offsets, int64_t experts, int64_t rows, uint64_t* fault) {
  if (!fault || blockIdx.x != 0) return;
  for (int64_t e = threadIdx.x; e <= experts; e += blockDim.x) {
    const int64_t at = offsets[e];
    if (e == 0 ? at != 0 : at < offsets[e - 1]) note(fault, Fault::offsets_order, e);
    if (e == experts && at > rows) note(fault, Fault::offsets, at);
  }
}

}  // namespace xt::cuda
