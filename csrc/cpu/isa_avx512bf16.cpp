// Products of bfloat16 on processors that multiply pairs of it. Everything else is AVX-512's.
#include "cpu/kernels.h"
#include "cpu/simd/vec_avx512.h"
//
#include "cpu/simd/gemm_tile.h"

namespace xt::cpu {

void gemm_tile_avx512bf16(const GemmTile& tile, float* scratch) {
  gemm_tile<avx512bf16::Vec, Paired>(tile, scratch);
}

}  // namespace xt::cpu
