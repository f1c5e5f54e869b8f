// Writing tokens to the rows of their experts: permute, and the gradient of unpermute.
#pragma once
#include "cpu/kernels.h"

namespace xt::cpu {

// An UnpermuteRows of these maps, with everything else still to be filled in.
UnpermuteRows routed_rows(DType dtype, int64_t hidden, const Tensor& row_of, const Tensor* probs);

// Runs Kernels::unpermute_bwd on all tokens of `a`, whose dy is `out`, and zeroes the rows that nobody owns. Each token
// is read once however many rows it has. Throws unless src and row_of are each other's inverse, for then every row has
// one writer.
void scatter(const char* op, UnpermuteRows a, const Tensor& row_of, const Tensor& src, const Tensor& out,
             int num_threads);

}  // namespace xt::cpu
