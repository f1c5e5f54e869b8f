#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// Tokens whose part of the sums is added up on its own.
constexpr int64_t topk_softmax_block_tokens = 64;

// What a router makes of its logits. T tokens, E experts, K choices.
struct TopkSoftmaxOutputs {
  Tensor weights;      // f32 [T, K]  probs of the choices, with `normalise` divided by their sum
  Tensor idx;          // i64 [T, K]  the choices, most probable first
  Tensor probs;        // f32 [T, E]  softmax of the logits
  Tensor logsumexp;    // f32 [T]     of the logits
  Tensor counts;       // f32 [E]     choices that went to each expert
  Tensor prob_sum;     // f32 [E]     sum of probs over tokens
  Tensor z_sum;        // f32 []      sum of logsumexp^2
  Tensor entropy_sum;  // f32 []      sum of the entropies of probs, in nats
};

// Choices of a token: the K experts with the largest probs (+ choice_bias), of equals the one with the lower index first.
// Where a logit is NaN all weights of its token are NaN, and the choices are the first K experts.
//   logits       f32 [T, E], E at least K
//   choice_bias  f32 [E] or null: counts for the choice only
//   topk_idx     i64 [T, K] or null: the choices are these, in [0, E), instead
//   workspace    f32 [ceil(T / topk_softmax_block_tokens), 2E+2], contents ignored
void topk_softmax(const Tensor& logits, const Tensor* choice_bias, const Tensor* topk_idx, bool normalise,
                  const TopkSoftmaxOutputs& out, const Tensor& workspace, Stream stream);

// Gradient of topk_softmax through weights, prob_sum and z_sum; null where there is none.
//   dweights     f32 [T, K] or null
//   dprob_sum    f32 [E] or null
//   dz_sum       f32 [] or null
//   dlogits      f32 [T, E]
void topk_softmax_bwd(const Tensor* dweights, const Tensor* dprob_sum, const Tensor* dz_sum, const Tensor& probs,
                      const Tensor& logsumexp, const Tensor& idx, bool normalise, const Tensor& dlogits, Stream stream);

}  // namespace xt
