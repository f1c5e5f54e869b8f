#include "xtuner/ops/gemm_m_grouped.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out,
                    Stream stream, const GemmMGroupedOptions& options) {
  ArgChecker check("gemm_m_grouped");
  check.tensor("a", a, data_dtypes, {{options.gather.src ? "T" : "R"}, {"Kd"}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  const Dim experts = {"E", offsets.shape[0] - 1}, inner = {"Kd", a.shape[1]};
  if (trans_b) {
    check.tensor("b", b, {a.dtype}, {experts, {"N"}, inner});
  } else {
    check.tensor("b", b, {a.dtype}, {experts, inner, {"N"}});
  }
  check.gather(options.gather.src, options.gather.num_experts_per_tok);
  const int64_t rows = options.gather.src ? options.gather.src->shape[0] : a.shape[0], n = b.shape[trans_b ? 1 : 2];
  check.tensor("out", out, data_dtypes, {{"R", rows}, {"N", n}});
  if (options.bias) check.tensor("bias", *options.bias, {out.dtype}, {experts, {"N", n}});
  if (options.act) {
    check.require(n % 2 == 0, "act needs an even N (gate, then up), got ", n);
    check.tensor("act", *options.act, {out.dtype}, {{"R", rows}, {"N/2", n / 2}});
    if (options.swiglu.limit) check.require(*options.swiglu.limit > 0, "limit must be positive, got ", *options.swiglu.limit);
  }
  check.require(a.shape[1] > 0 || !(options.bias || options.act), "Kd must be positive with a bias or act, got 0");
  check.require(!options.accumulate || !(options.bias || options.act), "accumulate goes with neither bias nor act");
  check.require(!options.accumulate || check.device().type == DeviceType::cpu, "accumulate needs a CPU");
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::gemm_m_grouped(a, b, offsets, trans_b, options, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::gemm_m_grouped(a, b, offsets, trans_b, options, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
