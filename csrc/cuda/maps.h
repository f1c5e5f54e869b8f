// The two maps between choices (flat t*K + k) and rows, as kernels see them. Kernels never write through an entry that
// the other map does not confirm: such an entry is noted and counts as -1.
#pragma once
#include "cuda/rows.h"

namespace xt::cuda {

struct Maps {
  const int32_t* row_of;  // [T, K]
  const int32_t* src;     // [R], or null where only row_of is used
  int64_t choices, rows;  // T*K, R
  uint32_t num_experts_per_tok;

  Maps(const Tensor& row_of, const Tensor* src, int64_t rows)
      : row_of(row_of.ptr<int32_t>()),
        src(src ? src->ptr<int32_t>() : nullptr),
        choices(row_of.numel()),
        rows(rows),
        num_experts_per_tok(static_cast<uint32_t>(row_of.shape[1])) {}

  // Row of a choice; -1 where it is dropped, or where the maps disagree.
  __device__ int32_t row(int64_t choice, uint64_t* fault, Fault kind) const {
    const int32_t r = __ldg(row_of + choice);
    if (r == -1) return -1;
    if (r >= 0 && r < rows && (!src || __ldg(src + r) == choice)) return r;
    note(fault, kind, choice);
    return -1;
  }

  // No choice owns the row.
  __device__ bool unowned(int64_t r, uint64_t* fault, Fault kind) const {
    const int32_t choice = __ldg(src + r);
    if (choice >= 0 && choice < choices && __ldg(row_of + choice) == r) return false;
    if (choice != -1) note(fault, kind, r);
    return true;
  }

  // Warps needed for zero_unowned.
  __host__ __device__ int64_t row_groups() const { return (rows + warp_size - 1) / warp_size; }
};

// One warp looks at 32 rows and zeroes those that no choice owns.
template <class Unit>
__device__ void zero_unowned(const Maps& maps, int64_t group, Unit* out, int64_t units, uint64_t* fault, Fault kind) {
  const int64_t first = group * warp_size, mine = first + lane();
  const bool zero = mine < maps.rows && maps.unowned(mine, fault, kind);
  for (unsigned rest = __ballot_sync(all_lanes, zero); rest; rest &= rest - 1) {
    Unit* row = out + (first + __ffs(rest) - 1) * units;
    for (int64_t u = lane(); u < units; u += warp_size) row[u] = {};
  }
}

}  // namespace xt::cuda
