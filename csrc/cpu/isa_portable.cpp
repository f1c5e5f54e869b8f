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
#include "cpu/simd/vec_portable.h"

namespace xt::cpu {

const Kernels kernels_portable = {
    "portable",
    swiglu_rows<portable::Vec>,
    swiglu_bwd_rows<portable::Vec>,
    rms_norm_rows<portable::Vec>,
    rms_norm_bwd_rows<portable::Vec>,
    rotary_tokens<portable::Vec>,
    cross_entropy_rows<portable::Vec>,
    topk_softmax_tokens<portable::Vec>,
    topk_softmax_bwd_tokens<portable::Vec>,
    unpermute_tokens<portable::Vec>,
    unpermute_bwd_tokens<portable::Vec>,
    quantize_rows<portable::Vec>,
    quantize_tile<portable::Vec>,
    dequantize_rows<portable::Vec>,
    unpermute_peer_tokens<portable::Vec>,
    copy_row_bytes<portable::Vec>,
    scale_and_dot<portable::Vec>,
    fence<portable::Vec>,
    portable::Vec::tile_rows,
    2 * portable::Vec::width,
    gemm_tile<portable::Vec, Single>,
    gemm_tile<portable::Vec, Single>,
    false,
    attention_scratch<portable::Vec>,
    attention_task<portable::Vec>,
    attention_bwd_scratch<portable::Vec>,
    attention_bwd_task<portable::Vec>,
};

}  // namespace xt::cpu
