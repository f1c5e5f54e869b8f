// The CPU kernels: same arguments as the ops, already checked for dtype, shape and contiguity.
// They still check values (indices, offsets), which is cheap here and impossible without a host sync elsewhere.
#pragma once
#include "xtuner/ops/ep_prepare.h"
#include "xtuner/ops/quantize.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/gemm_m_grouped_dswiglu.h"
#include "xtuner/ops/swiglu.h"
#include "xtuner/ops/topk_softmax.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, int num_threads);
void topk_softmax(const Tensor& logits, const Tensor* choice_bias, const Tensor* topk_idx, bool normalise,
                  const TopkSoftmaxOutputs& out, const Tensor& workspace, int num_threads);
void topk_softmax_bwd(const Tensor* dweights, const Tensor* dprob_sum, const Tensor* dz_sum, const Tensor& probs,
                      const Tensor& logsumexp, const Tensor& idx, bool normalise, const Tensor& dlogits,
                      int num_threads);
void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, int num_threads);
void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, int num_threads);
void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, int num_threads);
void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b,
                    const GemmMGroupedOptions& options, const Tensor& out, int num_threads);
void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x,
                            const DswigluOptions& options, const Tensor& dx, const Tensor& act, int num_threads);
int64_t gemm_m_grouped_dswiglu_workspace_size(int64_t rows, int64_t width);
void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const RowGather& gather_b,
                    const Tensor& out, int num_threads);
void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, int num_threads);
void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, int num_threads);
void cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights, bool gradient,
                   const Tensor& losses, int num_threads);
void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& inverse_rms,
              int num_threads);
void rms_norm_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& inverse_rms,
                  const Tensor& dx, const Tensor& dweight, const Tensor& workspace, int num_threads);
void rms_norm_rotary(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps,
                     const Tensor& out, const Tensor& inverse_rms, int num_threads);
void rms_norm_rotary_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& cos,
                         const Tensor& sin, const Tensor& inverse_rms, const Tensor& dx, const Tensor& dweight,
                         const Tensor& workspace, int num_threads);
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, const Tensor& out, int num_threads);
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, double scale,
               bool causal, const Tensor& out, const Tensor& lse, int num_threads);
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, double scale, bool causal,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, int num_threads);
void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    int num_threads);
void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      int num_threads);
void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, int num_threads);
void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, int num_threads);
void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            int num_threads);
void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, int num_threads);
void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, bool accumulate, const Tensor& out, int num_threads);
void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, int num_threads);

void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, int num_threads);
void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, int num_threads);
void ep_combine(const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor* probs, const Tensor& out,
                int num_threads);
void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, int num_threads);

// Throws Error naming `op` unless the first `used` values of the map are in [-1, num_tokens * num_experts_per_tok).
void check_gather(const char* op, const RowGather& gather, int64_t used, int64_t num_tokens);

// Rows in use, offsets[E]. Throws Error naming `op` unless 0 = offsets[0] <= ... <= offsets[E] <= num_rows.
int64_t used_rows(const char* op, const Tensor& offsets, int64_t num_rows);

}  // namespace xt::cpu
