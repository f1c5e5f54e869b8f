#pragma once
#include "xtuner/ops/swiglu.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Rows read through a map instead of one after the other: row r is row src[r] / num_experts_per_tok of the tensor, and
// all zero where src[r] == -1.
struct RowGather {
  const Tensor* src = nullptr;  // i32 [R] from route_map; null: no map
  int64_t num_experts_per_tok = 1;
};

struct GemmMGroupedOptions {
  RowGather gather;              // of a
  const Tensor* bias = nullptr;  // as out [E, N]: added to each row of expert e in fp32
  const Tensor* act = nullptr;   // as out [R, N/2]: also swiglu(out), bit for bit as that op computes it from out
  SwigluParams swiglu;
  bool accumulate = false;       // add to out, whose rows >= offsets[E] then stay as they are; neither bias nor act. CPU
};

// Each expert's rows times that expert's matrix, fp32 accumulation: with rows r in [offsets[e], offsets[e+1]),
//   trans_b:  out[r, n] = sum_k a[r, k] * b[e, n, k]      else:  out[r, n] = sum_k a[r, k] * b[e, k, n]
//   a        f32 | bf16 [R, Kd]    with a gather [T, Kd], T * num_experts_per_tok < 2^31
//   b        as a [E, N, Kd] when trans_b, else [E, Kd, N]
//   offsets  i64 [E+1]             0 = offsets[0] <= ... <= offsets[E] <= R
//   out      f32 | bf16 [R, N]     rows >= offsets[E] become zero; those rows of a (or of the map) are never read
// A row's bits depend on that row, b[e] and the instruction set only: not on other rows, R, the gather or the thread count.
void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out,
                    Stream stream, const GemmMGroupedOptions& options = {});

}  // namespace xt
