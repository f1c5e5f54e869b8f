#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// losses[t] = weights[t] * (logsumexp(logits[t]) - logits[t, labels[t]]), in fp32; with `gradient` the logits are then
// replaced by the gradient of the sum of losses, weights[t] * (softmax(logits[t]) - onehot(labels[t])).
//   logits   f32 | bf16 [T, V], V at least 1; overwritten with `gradient`
//   labels   i64 [T]   each in [0, V)
//   weights  f32 [T]
//   losses   f32 [T]
void cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights, bool gradient,
                   const Tensor& losses, Stream stream);

}  // namespace xt
