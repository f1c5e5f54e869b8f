// How a product by warpgroups is told where an operand lies in shared memory: bit fields as in the PTX manual.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace xt::cuda {

// An operand swizzled in 128-byte lines, at a multiple of 1024 bytes but for whole steps along k. Lines along k:
// `leading` is not used, `stride` is from 8 lines to the next 8. Lines of 64 elements along m or n: `leading` is from
// 64 elements to the next 64, `stride` from 8 values of k to the next 8.
__device__ inline uint64_t operand(uint32_t address, int leading, int stride) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
  return swizzle_128 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         ((address & 0x3ffffu) >> 4);
}

}  // namespace xt::cuda
