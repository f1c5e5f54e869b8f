#include "xtuner/ops/gemm_m_grouped_fp8.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, Stream stream) {
  ArgChecker check("gemm_m_grouped_fp8");
  check.tensor("a", a, fp8_dtypes, {{"R"}, {"K"}});
  const int64_t r = a.shape[0], k = a.shape[1];
  check.fp8_dim("K", k);
  check.tensor("scale_a", scale_a, {DType::f32}, {{"K/128", k / 128}, {"ld"}});
  check.require(scale_a.shape[1] >= r, "scale_a must have a column for each of the R=", r, " rows, got ",
                scale_a.shape[1]);
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  const Dim experts = {"E", offsets.shape[0] - 1};
  check.tensor("b", b, fp8_dtypes, {experts, {"N"}, {"K", k}});
  const int64_t n = b.shape[1];
  check.fp8_dim("N", n);
  check.strided("scale_b", scale_b, {DType::f32}, {experts, {"N/128", n / 128}, {"K/128", k / 128}});
  check.tensor("out", out, data_dtypes, {{"R", r}, {"N", n}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::gemm_m_grouped_fp8(a, scale_a, b, scale_b, offsets, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda:
      return cuda::gemm_m_grouped_fp8(a, scale_a, b, scale_b, offsets, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
