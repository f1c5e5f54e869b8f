#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/reduce_row.h"

namespace xt::cpu {

// The k largest of n scores, in order; of equals the first ones. `best` holds their scores meanwhile.
XT_INLINE void choose_largest(const float* probs, const float* bias, int64_t n, int64_t k, float* best, int64_t* idx) {
  for (int64_t e = 0; e < n; ++e) {
    const float score = bias ? probs[e] + bias[e] : probs[e];
    if (e >= k && !(score > best[k - 1])) continue;
    int64_t at = e < k ? e : k - 1;
    for (; at > 0 && score > best[at - 1]; --at) best[at] = best[at - 1], idx[at] = idx[at - 1];
    best[at] = score, idx[at] = e;
  }
}

// `sums`: counts [E], prob_sum [E], z_sum and entropy_sum of these tokens.
template <class Vec>
void topk_softmax_tokens(const TopkSoftmaxTokens& a, int64_t begin, int64_t end, float* sums) {
  const int64_t num_experts = a.num_experts, k = a.num_experts_per_tok;
  for (int64_t i = 0; i < 2 * num_experts + 2; ++i) sums[i] = 0;
  float *counts = sums, *prob_sum = sums + num_experts, *z_sum = sums + 2 * num_experts, *entropy_sum = z_sum + 1;
  for (int64_t t = begin; t < end; ++t) {
    const float* x = a.logits + t * num_experts;
    float *probs = a.probs + t * num_experts, *weights = a.weights + t * k;
    int64_t* idx = a.idx + t * k;
    const float most = largest<Vec>(x, num_experts);
    const float total =
        sum_of_row<Vec>(num_experts, [&](int64_t i, auto n) { return exp(load<Vec>(x + i, n) - Vec::all(most)); });
    const float logsumexp = most + __builtin_logf(total);
    a.logsumexp[t] = logsumexp;
    const float mean = sum_of_row<Vec>(num_experts, [&](int64_t i, auto n) {
      const Vec logit = load<Vec>(x + i, n), p = exp(logit - Vec::all(logsumexp));
      store(p, probs + i, n);
      store(load<Vec>(prob_sum + i, n) + p, prob_sum + i, n);
      return p * logit;
    });
    *z_sum += logsumexp * logsumexp;
    *entropy_sum += logsumexp - mean;
    if (a.given) {
      for (int64_t i = 0; i < k; ++i) idx[i] = a.given[t * k + i];
    } else {
      choose_largest(probs, a.choice_bias, num_experts, k, weights, idx);
    }
    float chosen = 0;
    for (int64_t i = 0; i < k; ++i) {
      counts[idx[i]] += 1;
      chosen += weights[i] = probs[idx[i]];
    }
    for (int64_t i = 0; i < k && a.normalise; ++i) weights[i] /= chosen;
  }
}

// With g the gradient of probs: dlogits = probs (g - <probs, g> + 2 dz_sum logsumexp).
template <class Vec>
void topk_softmax_bwd_tokens(const TopkSoftmaxGradient& a, int64_t begin, int64_t end) {
  const int64_t num_experts = a.num_experts, k = a.num_experts_per_tok;
  for (int64_t t = begin; t < end; ++t) {
    const float *probs = a.probs + t * num_experts, *dweights = a.dweights ? a.dweights + t * k : nullptr;
    const int64_t* idx = a.idx + t * k;
    float* dlogits = a.dlogits + t * num_experts;
    float chosen = 0, along = 0, mean = 0;
    for (int64_t i = 0; i < k && dweights; ++i) {
      chosen += probs[idx[i]];
      along += dweights[i] * probs[idx[i]];
    }
    if (a.dprob_sum) {
      mean = sum_of_row<Vec>(num_experts, [&](int64_t i, auto n) {
        return load<Vec>(probs + i, n) * load<Vec>(a.dprob_sum + i, n);
      });
    }
    // Of the normalised weights, which do not change when all of them grow alike; else of the chosen probs themselves.
    const float scale = a.normalise ? 1 / chosen : 1, offset = a.normalise ? along / chosen : 0;
    if (!a.normalise) mean += along;
    const Vec common = Vec::all(2 * a.dz_sum * a.logsumexp[t] - mean);
    each_vector<Vec>(num_experts, [&](int64_t i, auto n) {
      const Vec g = a.dprob_sum ? load<Vec>(a.dprob_sum + i, n) + common : common;
      store(load<Vec>(probs + i, n) * g, dlogits + i, n);
    });
    for (int64_t i = 0; i < k && dweights; ++i) dlogits[idx[i]] += probs[idx[i]] * ((dweights[i] - offset) * scale);
  }
}

}  // namespace xt::cpu
