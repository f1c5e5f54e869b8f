#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Where each routed (token, k) goes when rows are grouped by expert: a stable counting sort.
//   topk_idx  i32 | i64 [T, K]   expert of each choice in [0, E), or -1: dropped
//   align     >= 1               every expert's first row is a multiple of this
//   counts    i32 [E]            out: choices of each expert
//   offsets   i64 [E+1]          out: first row of each expert; offsets[E] = rows used (pad rows included)
//   row_of    i32 [T, K]         out: row of each choice, -1 where dropped; within an expert, rows follow (t, k) order
//   src       i32 [R]            out: t*K + k that fills the row, -1 on pad rows and on rows >= offsets[E]
// Errors: an index outside [-1, E) (names token, k and value); R < offsets[E]; T*K or R >= 2^31.
void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, Stream stream);

}  // namespace xt
