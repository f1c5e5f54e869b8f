// What the kernels of float8 grouped products share, as gemm.h is for the others.
#pragma once
#include "cuda/fp8.h"
#include "cuda/gemm.h"

namespace xt::cuda {

// out[r, n] = sum over the blocks b of 128 k of
//   (sum_k a[r, k] b[e, n, k] over the block) * (scale_a[b * scale_a_ld + r] * scale_b[e, n / 128, b]).
struct MGroupedFp8 {
  const void *a, *b;
  DType a_format, b_format;
  const float *scale_a, *scale_b;
  int64_t scale_a_ld;
  int64_t scale_b_expert, scale_b_n, scale_b_k;  // strides
  const int64_t* offsets;
  int64_t experts, rows, n, k;
  Epilogue epilogue;
  uint64_t* fault;
};

// out[e, m, n] = sum over the blocks b of 128 columns t of expert e of
//   (sum_t a[m, t] b[n, t] over the block) * (scale_a[b, m] * scale_b[b, n]).
struct KGroupedFp8 {
  const void *a, *b;
  DType a_format, b_format;
  const float *scale_a, *scale_b;
  const int64_t* offsets;  // of rows: see PaddedRanges
  int64_t experts, columns, m, n;
  Epilogue epilogue;
  uint64_t* fault;
};

// Plain multiply-adds: for GPUs without kernels of their own.
void simple_m_grouped_fp8(const MGroupedFp8& g, Stream stream);
void simple_k_grouped_fp8(const KGroupedFp8& g, Stream stream);

namespace sm90 {  // at least one expert, k or columns > 0, scale_a_ld a multiple of 4, and sizes below 2^31
void gemm_m_grouped_fp8(const MGroupedFp8& g, int multiprocessors, Stream stream);
void gemm_k_grouped_fp8(const KGroupedFp8& g, int multiprocessors, Stream stream);
}  // namespace sm90

// Calls body(A{}, B{}) with the types of the operands' codes.
template <class Body>
void with_operands(DType a, DType b, const Body& body) {
  const auto with_b = [&](auto a_type) {
    b == DType::e4m3 ? body(a_type, e4m3_t{}) : body(a_type, e5m2_t{});
  };
  a == DType::e4m3 ? with_b(e4m3_t{}) : with_b(e5m2_t{});
}

// As check_offsets, and notes the first expert whose padded rows do not fit into the columns.
__device__ inline void check_padded_offsets(const int64_t* offsets, int64_t experts, int64_t columns, uint64_t* fault) {
  check_offsets(offsets, experts, columns, fault);
  if (!fault || blockIdx.x != 0 || threadIdx.x != 0) return;
  for (PaddedRanges range(offsets, experts, columns); range.expert() < experts; range.advance()) {
    if (offsets[range.expert() + 1] > range.rows_end()) return note(fault, Fault::gemm_columns, range.expert());
  }
}

}  // namespace xt::cuda
