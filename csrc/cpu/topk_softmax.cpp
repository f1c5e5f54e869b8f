#include "xtuner/ops/topk_softmax.h"

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

void check_idx(const char* op, const Tensor& idx, int64_t num_experts) {
  const int64_t k = idx.shape[1];
  for (int64_t i = 0; i < idx.numel(); ++i) {
    const int64_t e = idx.ptr<int64_t>()[i];
    if (e < 0 || e >= num_experts) {
      fail(op, ": topk_idx[", i / k, ", ", i % k, "] must be in [0, E=", num_experts, "), got ", e);
    }
  }
}

// Adds up the blocks' sums in their order.
void sum_blocks(const Tensor& workspace, const TopkSoftmaxOutputs& out) {
  const int64_t num_experts = out.counts.shape[0], width = workspace.shape[1];
  for (int64_t i = 0; i < width; ++i) {
    float total = 0;
    for (int64_t b = 0; b < workspace.shape[0]; ++b) total += workspace.ptr<float>()[b * width + i];
    if (i < num_experts) {
      out.counts.ptr<float>()[i] = total;
    } else if (i < 2 * num_experts) {
      out.prob_sum.ptr<float>()[i - num_experts] = total;
    } else {
      *(i == 2 * num_experts ? out.z_sum : out.entropy_sum).ptr<float>() = total;
    }
  }
}

}  // namespace

void topk_softmax(const Tensor& logits, const Tensor* choice_bias, const Tensor* topk_idx, bool normalise,
                  const TopkSoftmaxOutputs& out, const Tensor& workspace, int num_threads) {
  TopkSoftmaxTokens a = {};
  a.num_experts = logits.shape[1];
  a.num_experts_per_tok = out.idx.shape[1];
  a.normalise = normalise;
  if (topk_idx) {
    check_idx("topk_softmax", *topk_idx, a.num_experts);
    a.given = topk_idx->ptr<int64_t>();
  }
  a.logits = logits.ptr<float>();
  a.choice_bias = choice_bias ? choice_bias->ptr<float>() : nullptr;
  a.weights = out.weights.ptr<float>();
  a.idx = out.idx.ptr<int64_t>();
  a.probs = out.probs.ptr<float>();
  a.logsumexp = out.logsumexp.ptr<float>();
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, logits.shape[0], topk_softmax_block_tokens, [&](int64_t begin, int64_t end) {
    isa.topk_softmax(a, begin, end, workspace.ptr<float>() + begin / topk_softmax_block_tokens * workspace.shape[1]);
  });
  sum_blocks(workspace, out);
}

void topk_softmax_bwd(const Tensor* dweights, const Tensor* dprob_sum, const Tensor* dz_sum, const Tensor& probs,
                      const Tensor& logsumexp, const Tensor& idx, bool normalise, const Tensor& dlogits,
                      int num_threads) {
  check_idx("topk_softmax_bwd", idx, probs.shape[1]);
  TopkSoftmaxGradient a = {};
  a.num_experts = probs.shape[1];
  a.num_experts_per_tok = idx.shape[1];
  a.normalise = normalise;
  a.dweights = dweights ? dweights->ptr<float>() : nullptr;
  a.dprob_sum = dprob_sum ? dprob_sum->ptr<float>() : nullptr;
  a.dz_sum = dz_sum ? *dz_sum->ptr<float>() : 0.0f;
  a.probs = probs.ptr<float>();
  a.logsumexp = logsumexp.ptr<float>();
  a.idx = idx.ptr<int64_t>();
  a.dlogits = dlogits.ptr<float>();
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, probs.shape[0], rows_per_task(row_bytes(probs)),
                  [&](int64_t begin, int64_t end) { isa.topk_softmax_bwd(a, begin, end); });
}

}  // namespace xt::cpu
