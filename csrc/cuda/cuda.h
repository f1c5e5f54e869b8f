// The CUDA kernels: same arguments as the ops, already checked for dtype, shape, contiguity and alignment.
// They only put work on the stream: no allocation, no synchronisation, so every op can be captured into a CUDA graph.
// Values (indices, offsets) are checked on the device: bad ones are skipped and noted in stream.fault.
#pragma once
#include "xtuner/ops/ep_prepare.h"
#include "xtuner/ops/quantize.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/gemm_m_grouped_dswiglu.h"
#include "xtuner/ops/swiglu.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt::cuda {

int64_t route_map_workspace_size(int64_t num_choices, int64_t num_experts);
void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, const Tensor* workspace, Stream stream);
void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, Stream stream);
void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, Stream stream);
void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, Stream stream);
void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, Stream stream);
void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, Stream stream);
void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b,
                    const GemmMGroupedOptions& options, const Tensor& out, Stream stream);
int64_t gemm_m_grouped_dswiglu_workspace_size(int64_t rows, int64_t width);
void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x,
                            const DswigluOptions& options, const Tensor& dx, const Tensor& act, Stream stream);
void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const RowGather& gather_b,
                    const Tensor& out, Stream stream);
void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, Stream stream);
void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, bool accumulate, const Tensor& out, Stream stream);
void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    Stream stream);
void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      Stream stream);
void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, Stream stream);
void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, Stream stream);
void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            Stream stream);
void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, Stream stream);

int64_t ep_prepare_workspace_size(int64_t num_choices, int64_t num_experts);
void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, const Tensor& workspace, Stream stream);
void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream);
void ep_combine(const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor* probs, const Tensor& out,
                Stream stream);
void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, Stream stream);

}  // namespace xt::cuda
