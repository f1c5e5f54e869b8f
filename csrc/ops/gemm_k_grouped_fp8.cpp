#include "xtuner/ops/gemm_k_grouped_fp8.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, double beta, const Tensor& out, Stream stream) {
  ArgChecker check("gemm_k_grouped_fp8");
  check.tensor("a", a, fp8_dtypes, {{"M"}, {"P"}});
  const int64_t m = a.shape[0], p = a.shape[1];
  check.fp8_dim("M", m);
  check.fp8_dim("P", p);
  check.tensor("scale_a", scale_a, {DType::f32}, {{"P/128", p / 128}, {"M", m}});
  check.tensor("b", b, fp8_dtypes, {{"N"}, {"P", p}});
  const int64_t n = b.shape[0];
  check.fp8_dim("N", n);
  check.tensor("scale_b", scale_b, {DType::f32}, {{"P/128", p / 128}, {"N", n}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  check.require(beta == 0.0 || beta == 1.0, "beta must be 0 or 1, got ", beta);
  check.tensor("out", out, data_dtypes, {{"E", offsets.shape[0] - 1}, {"M", m}, {"N", n}});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::gemm_k_grouped_fp8(a, scale_a, b, scale_b, offsets, beta == 1.0, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda:
      return cuda::gemm_k_grouped_fp8(a, scale_a, b, scale_b, offsets, beta == 1.0, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
