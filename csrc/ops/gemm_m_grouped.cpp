#include "xtuner/ops/gemm_m_grouped.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out,
                    Stream stream) {
  ArgChecker check("gemm_m_grouped");
  check.tensor("a", a, data_dtypes, {{"R"}, {"Kd"}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  const Dim experts = {"E", offsets.shape[0] - 1}, inner = {"Kd", a.shape[1]};
  if (trans_b) {
    check.tensor("b", b, {a.dtype}, {experts, {"N"}, inner});
  } else {
    check.tensor("b", b, {a.dtype}, {experts, inner, {"N"}});
  }
  check.tensor("out", out, data_dtypes, {{"R", a.shape[0]}, {"N", b.shape[trans_b ? 1 : 2]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::gemm_m_grouped(a, b, offsets, trans_b, out, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
