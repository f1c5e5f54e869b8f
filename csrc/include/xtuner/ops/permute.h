#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Copies each token to the rows of its experts: out[row_of[t,k]] = x[t], zero where src[r] == -1.
//   x       f32 | bf16 [T, H]
//   row_of  i32 [T, K]     from route_map, in [-1, R); -1: dropped
//   src     i32 [R]        the inverse of row_of: src[row_of[t,k]] == t*K + k, -1 on rows that nobody owns
//   out     as x [R, H]
// Errors: src and row_of are not each other's inverse (names the first entry that shows it). On a GPU that is a fault
// (device_fault.h): such a choice counts as dropped, such a row as nobody's.
void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, Stream stream);

}  // namespace xt
