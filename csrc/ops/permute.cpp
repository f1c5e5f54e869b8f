#include "xtuner/ops/permute.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void permute(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& out, Stream stream) {
  ArgChecker check("permute");
  check.tensor("x", x, data_dtypes, {{"T"}, {"H"}});
  check.tensor("src", src, {DType::i32}, {{"R"}});
  check.tensor("out", out, {x.dtype}, {{"R", src.shape[0]}, {"H", x.shape[1]}});
  check.require(num_experts_per_tok >= 0, "num_experts_per_tok must not be negative, got ", num_experts_per_tok);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::permute(x, src, num_experts_per_tok, out, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
