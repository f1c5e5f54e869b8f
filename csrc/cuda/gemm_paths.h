// Which kernels a grouped product takes.
#pragma once
#include "cuda/gemm.h"

namespace xt::cuda {

enum class GemmPath {
  simple,
  sm80,
#ifdef XT_CUDA_SM90  // this build has code for Hopper
  sm90,
#endif
};

// With room for the tile that reaches past the end.
inline bool fits_int32(std::initializer_list<int64_t> sizes) { return std::max(sizes) <= INT32_MAX - 1024; }

#ifdef XT_CUDA_SM90
inline bool is_hopper(const char* op, const Tensor& a) {
  return device_attribute(op, a, cudaDevAttrComputeCapabilityMajor) == 9;
}
#endif

// `units`: rows are whole 16-byte units, and columns fit into 32 bits; `tiles`: the copy engine can be told the shape.
inline GemmPath gemm_path(const char* op, const Tensor& a, bool units, bool tiles) {
  if (a.dtype != DType::bf16 || !units) return GemmPath::simple;
#ifdef XT_CUDA_SM90
  if (tiles && is_hopper(op, a)) return GemmPath::sm90;
#else
  static_cast<void>(op);
  static_cast<void>(tiles);
#endif
  return GemmPath::sm80;
}

inline int multiprocessors(const char* op, const Tensor& a) {
  return device_attribute(op, a, cudaDevAttrMultiProcessorCount);
}

}  // namespace xt::cuda
