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
//   workspace i32 [W] or null    scratch, W >= route_map_workspace_size(...); null where that is 0
// Errors: an index outside [-1, E) (names token, k and value); R < offsets[E]; T*K or R >= 2^31; E >= 2^30.
// On a GPU the first two are faults (device_fault.h): such an index counts as dropped; choices whose row would lie past R
// are dropped from the maps, counts still count them, and offsets end at R.
void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, Stream stream, const Tensor* workspace = nullptr);

// W for T*K choices; 0 on the CPU.
int64_t route_map_workspace_size(int64_t num_choices, int64_t num_experts, DeviceType device);

}  // namespace xt
