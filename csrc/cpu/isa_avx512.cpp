#include "cpu/kernels.h"
#include "cpu/simd/attention.h"
#include "cpu/simd/attention_bwd.h"
#include "cpu/simd/cross_entropy.h"
#include "cpu/simd/gemm_tile.h"
#include "cpu/simd/quantize.h"
#include "cpu/simd/rms_norm.h"
#include "cpu/simd/rotary.h"
#include "cpu/simd/swiglu.h"
#include "cpu/simd/topk_softmax.h"
#include "cpu/simd/unpermute.h"
#include "cpu/simd/vec_avx512.h"

namespace xt::cpu {

const Kernels kernels_avx512 = {
    "avx512",
    swiglu_rows<avx512::Vec>,
    swiglu_bwd_rows<avx512::Vec>,
    rms_norm_rows<avx512::Vec>,
    rms_norm_bwd_rows<avx512::Vec>,
    rotary_tokens<avx512::Vec>,
    cross_entropy_rows<avx512::Vec>,
    topk_softmax_tokens<avx512::Vec>,
    topk_softmax_bwd_tokens<avx512::Vec>,
    unpermute_tokens<avx512::Vec>,
    unpermute_bwd_tokens<avx512::Vec>,
    quantize_rows<avx512::Vec>,
    quantize_tile<avx512::Vec>,
    dequantize_rows<avx512::Vec>,
    unpermute_peer_tokens<avx512::Vec>,
    copy_row_bytes<avx512::Vec>,
    scale_and_dot<avx512::Vec>,
    fence<avx512::Vec>,
    avx512::Vec::tile_rows,
    2 * avx512::Vec::width,
    gemm_tile<avx512::Vec, Single>,
    gemm_tile<avx512::Vec, Single>,
    false,
    attention_scratch<avx512::Vec>,
    attention_task<avx512::Vec>,
    attention_bwd_scratch<avx512::Vec>,
    attention_bwd_task<avx512::Vec>,
};

}  // namespace xt::cpu
