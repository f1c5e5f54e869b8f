#include "xtuner/ops/gemm_k_grouped.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, double beta, const Tensor& out,
                    Stream stream, const RowGather& gather_b) {
  ArgChecker check("gemm_k_grouped");
  check.tensor("a", a, data_dtypes, {{"R"}, {"M"}});
  if (gather_b.src) {
    check.tensor("b", b, {a.dtype}, {{"T"}, {"N"}});
    check.gather(gather_b.src, gather_b.num_experts_per_tok, a.shape[0]);
  } else {
    check.tensor("b", b, {a.dtype}, {{"R", a.shape[0]}, {"N"}});
  }
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  check.tensor("out", out, data_dtypes, {{"E", offsets.shape[0] - 1}, {"M", a.shape[1]}, {"N", b.shape[1]}});
  check.require(beta == 0.0 || beta == 1.0, "beta must be 0 or 1, got ", beta);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::gemm_k_grouped(a, b, offsets, beta == 1.0, gather_b, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::gemm_k_grouped(a, b, offsets, beta == 1.0, gather_b, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
