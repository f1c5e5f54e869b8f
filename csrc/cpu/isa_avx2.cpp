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
#include "cpu/simd/vec_avx2.h"

namespace xt::cpu {

const Kernels kernels_avx2 = {
    "avx2",
    swiglu_rows<avx2::Vec>,
    swiglu_bwd_rows<avx2::Vec>,
    rms_norm_rows<avx2::Vec>,
    rms_norm_bwd_rows<avx2::Vec>,
    rotary_tokens<avx2::Vec>,
    cross_entropy_rows<avx2::Vec>,
    topk_softmax_tokens<avx2::Vec>,
    topk_softmax_bwd_tokens<avx2::Vec>,
    unpermute_tokens<avx2::Vec>,
    unpermute_bwd_tokens<avx2::Vec>,
    quantize_rows<avx2::Vec>,
    quantize_tile<avx2::Vec>,
    dequantize_rows<avx2::Vec>,
    unpermute_peer_tokens<avx2::Vec>,
    copy_row_bytes<avx2::Vec>,
    scale_and_dot<avx2::Vec>,
    fence<avx2::Vec>,
    avx2::Vec::tile_rows,
    2 * avx2::Vec::width,
    gemm_tile<avx2::Vec, Single>,
    gemm_tile<avx2::Vec, Single>,
    false,
    attention_scratch<avx2::Vec>,
    attention_task<avx2::Vec>,
    attention_bwd_scratch<avx2::Vec>,
    attention_bwd_task<avx2::Vec>,
};

}  // namespace xt::cpu
