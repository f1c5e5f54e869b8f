// The double of the driver's tensor maps: the rules of cuTensorMapEncodeTiled as its manual has them.
#pragma once
#include "async.h"

struct alignas(64) CUtensorMap {
  cuda_host::TensorMap content;
};

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0, CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, uint32_t rank, void* address,
                                       const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                                       const uint32_t* element_strides, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  bool ok = address && reinterpret_cast<uintptr_t>(address) % 16 == 0 && rank >= 1 && rank <= 5 &&
            (!swizzled || box[0] * size <= 128) && box[0] * size % 16 == 0;
  cuda_host::TensorMap t = {static_cast<const char*>(address), size, static_cast<int>(rank), {}, {}, {}, swizzled};
  for (uint32_t i = 0; ok && i < rank; ++i) {
    t.dims[i] = dims[i];
    t.box[i] = box[i];
    t.strides[i] = i ? strides[i - 1] : static_cast<uint64_t>(size);
    ok = dims[i] >= 1 && dims[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && element_strides[i] == 1;
    if (i) ok = ok && t.strides[i] % 16 == 0 && t.strides[i] < uint64_t{1} << 40;
  }
  if (!ok) return CUDA_ERROR_INVALID_VALUE;
  map->content = t;
  return CUDA_SUCCESS;
}
