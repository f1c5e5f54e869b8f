#include "xtuner/ops/topk_softmax.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void topk_softmax(const Tensor& logits, const Tensor* choice_bias, const Tensor* topk_idx, bool normalise,
                  const TopkSoftmaxOutputs& out, const Tensor& workspace, Stream stream) {
  ArgChecker check("topk_softmax");
  check.tensor("logits", logits, {DType::f32}, {{"T"}, {"E"}});
  check.tensor("idx", out.idx, {DType::i64}, {{"T", logits.shape[0]}, {"K"}});
  const Dim tokens = {"T", logits.shape[0]}, experts = {"E", logits.shape[1]}, choices = {"K", out.idx.shape[1]};
  const Dim blocks = {"T/64", (tokens.size + topk_softmax_block_tokens - 1) / topk_softmax_block_tokens};
  if (choice_bias) check.tensor("choice_bias", *choice_bias, {DType::f32}, {experts});
  if (topk_idx) check.tensor("topk_idx", *topk_idx, {DType::i64}, {tokens, choices});
  check.tensor("weights", out.weights, {DType::f32}, {tokens, choices});
  check.tensor("probs", out.probs, {DType::f32}, {tokens, experts});
  check.tensor("logsumexp", out.logsumexp, {DType::f32}, {tokens});
  check.tensor("counts", out.counts, {DType::f32}, {experts});
  check.tensor("prob_sum", out.prob_sum, {DType::f32}, {experts});
  check.tensor("z_sum", out.z_sum, {DType::f32}, {});
  check.tensor("entropy_sum", out.entropy_sum, {DType::f32}, {});
  check.tensor("workspace", workspace, {DType::f32}, {blocks, {"2E+2", 2 * experts.size + 2}});
  check.require(choices.size >= 1 && choices.size <= experts.size, "K must be in [1, E=", experts.size, "], got ",
                choices.size);
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::topk_softmax(logits, choice_bias, topk_idx, normalise, out, workspace, stream.num_threads);
    default: check.no_kernel();
  }
}

void topk_softmax_bwd(const Tensor* dweights, const Tensor* dprob_sum, const Tensor* dz_sum, const Tensor& probs,
                      const Tensor& logsumexp, const Tensor& idx, bool normalise, const Tensor& dlogits,
                      Stream stream) {
  ArgChecker check("topk_softmax_bwd");
  check.tensor("probs", probs, {DType::f32}, {{"T"}, {"E"}});
  const Dim tokens = {"T", probs.shape[0]}, experts = {"E", probs.shape[1]};
  check.tensor("logsumexp", logsumexp, {DType::f32}, {tokens});
  check.tensor("idx", idx, {DType::i64}, {tokens, {"K"}});
  if (dweights) check.tensor("dweights", *dweights, {DType::f32}, {tokens, {"K", idx.shape[1]}});
  if (dprob_sum) check.tensor("dprob_sum", *dprob_sum, {DType::f32}, {experts});
  if (dz_sum) check.tensor("dz_sum", *dz_sum, {DType::f32}, {});
  check.tensor("dlogits", dlogits, {DType::f32}, {tokens, experts});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::topk_softmax_bwd(dweights, dprob_sum, dz_sum, probs, logsumexp, idx, normalise, dlogits,
                                   stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
