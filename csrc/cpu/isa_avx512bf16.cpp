// Where processors multiply pairs of bfloat16 and round to it. Everything else is AVX-512's.
#include "cpu/kernels.h"
#include "cpu/simd/vec_avx512.h"
//
#include "cpu/simd/gemm_tile.h"
#include "cpu/simd/quantize.h"
#include "cpu/simd/unpermute.h"

namespace xt::cpu {

void use_avx512bf16(Kernels& k) {
  k.name = "avx512bf16";
  k.unpermute = unpermute_tokens<avx512bf16::Vec>;
  k.unpermute_bwd = unpermute_bwd_tokens<avx512bf16::Vec>;
  k.unpermute_peers = unpermute_peer_tokens<avx512bf16::Vec>;
  k.scale_and_dot = scale_and_dot<avx512bf16::Vec>;
  k.dequantize_rows = dequantize_rows<avx512bf16::Vec>;
  k.gemm_tile_bf16 = gemm_tile<avx512bf16::Vec, Paired>;
  k.gemm_pairs_bf16 = true;
}

}  // namespace xt::cpu
