// What the copy engine is told about an operand in global memory. Shapes are plain numbers, so that tests can check them
// against brute force; encode() turns them into the driver's descriptor, which travels as a kernel parameter.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <cstdint>

#include "cuda/launch.h"

namespace xt::cuda {

// Dims from the innermost on; `strides` in bytes, of all dims but the innermost. A box arrives in shared memory with its
// dims in this order: in lines of 128 bytes that are swizzled, or as it is.
struct TensorMapShape {
  const void* data;
  CUtensorMapDataType type;
  uint32_t rank;
  uint64_t dims[4];
  uint64_t strides[3];
  uint32_t box[4];
  bool swizzled = true;
};

constexpr uint32_t line_bytes = 128;

template <class T>
constexpr CUtensorMapDataType tensor_map_type = CU_TENSOR_MAP_DATA_TYPE_UINT8;  // float8
template <>
inline constexpr CUtensorMapDataType tensor_map_type<bf16_t> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType tensor_map_type<float> = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

// x[rows, cols]: boxes of `box_rows` rows by 128 bytes.
template <class T>
TensorMapShape map_of_rows(const T* x, int64_t rows, int64_t cols, int box_rows) {
  const auto r = static_cast<uint64_t>(rows), c = static_cast<uint64_t>(cols);
  return {x, tensor_map_type<T>, 2, {c, r}, {c * sizeof(T)}, {line_bytes / sizeof(T), static_cast<uint32_t>(box_rows)}};
}

// Scales of `lines` lines in each block of k: boxes of box_lines of one block.
inline TensorMapShape map_of_scales(const float* s, int64_t k_blocks, int64_t lines, int box_lines) {
  const auto b = static_cast<uint64_t>(k_blocks), l = static_cast<uint64_t>(lines);
  return {s, tensor_map_type<float>, 2, {l, b}, {l * sizeof(float)}, {static_cast<uint32_t>(box_lines), 1}, false};
}

// b[E, halves * n, K]: boxes of box_n rows, which come in equal numbers from each half. Coordinates (k, n, 0, e).
template <class T>
TensorMapShape map_along_k(const T* b, int64_t experts, int64_t n, int64_t k, int halves, int box_n) {
  const auto e = static_cast<uint64_t>(experts), h = static_cast<uint64_t>(halves), k_size = static_cast<uint64_t>(k),
             n_half = static_cast<uint64_t>(n) / h, row = k_size * sizeof(T);
  const auto box_half = static_cast<uint32_t>(box_n / halves), box_halves = static_cast<uint32_t>(halves);
  return {b, tensor_map_type<T>, 4, {k_size, n_half, h, e}, {row, row * n_half, row * n_half * h},
          {line_bytes / sizeof(T), box_half, box_halves, 1}};
}

// b[E, K, halves * n]: boxes of box_k rows by 128 bytes. Coordinates (n within the half, half, k, e).
template <class T>
TensorMapShape map_along_n(const T* b, int64_t experts, int64_t k, int64_t n, int halves, int box_k) {
  const auto e = static_cast<uint64_t>(experts), h = static_cast<uint64_t>(halves), k_size = static_cast<uint64_t>(k),
             n_half = static_cast<uint64_t>(n) / h, half = n_half * sizeof(T);
  return {b, tensor_map_type<T>, 4, {n_half, h, k_size, e}, {half, half * h, half * h * k_size},
          {line_bytes / sizeof(T), 1, static_cast<uint32_t>(box_k), 1}};
}

// The driver's function, found at run time: nothing is linked with libcuda, which machines without a GPU lack.
inline PFN_cuTensorMapEncodeTiled_v12000 encode_function(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#else
  check(op, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess) fail(op, ": the CUDA driver is too old: it must know CUDA 12.0");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

inline CUtensorMap encode(const char* op, const TensorMapShape& s) {
  CUtensorMap map;
  const uint32_t every_element[4] = {1, 1, 1, 1};
  const CUresult result = encode_function(op)(
      &map, s.type, s.rank, const_cast<void*>(s.data), s.dims, s.strides, s.box, every_element,
      CU_TENSOR_MAP_INTERLEAVE_NONE, s.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) fail(op, ": the CUDA driver refuses the tensor map (error ", static_cast<int>(result), ")");
  return map;
}

}  // namespace xt::cuda
