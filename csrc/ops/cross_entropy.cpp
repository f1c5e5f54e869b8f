#include "xtuner/ops/cross_entropy.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights, bool gradient,
                   const Tensor& losses, Stream stream) {
  ArgChecker check("cross_entropy");
  check.tensor("logits", logits, data_dtypes, {{"T"}, {"V"}});
  const Dim tokens = {"T", logits.shape[0]};
  check.tensor("labels", labels, {DType::i64}, {tokens});
  check.tensor("weights", weights, {DType::f32}, {tokens});
  check.tensor("losses", losses, {DType::f32}, {tokens});
  check.require(logits.shape[1] > 0, "logits must have at least one column, got none");
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::cross_entropy(logits, labels, weights, gradient, losses, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
