#include "xtuner/ops/gemm_m_grouped_dswiglu.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x, const Tensor& dx,
                            const Tensor& act, Stream stream, const DswigluOptions& options) {
  ArgChecker check("gemm_m_grouped_dswiglu");
  check.tensor("dy", dy, data_dtypes, {{"R"}, {"D"}});
  check.require(dy.shape[1] > 0, "D must be positive, got 0");
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  check.tensor("b", b, {dy.dtype}, {{"E", offsets.shape[0] - 1}, {"D", dy.shape[1]}, {"I"}});
  const Dim rows = {"R", dy.shape[0]};
  check.tensor("x", x, {dy.dtype}, {rows, {"2I", 2 * b.shape[2]}});
  check.tensor("dx", dx, {dy.dtype}, {rows, {"2I", 2 * b.shape[2]}});
  check.tensor("act", act, {dy.dtype}, {rows, {"I", b.shape[2]}});
  const bool weighted = options.weights;
  check.require(weighted == (options.dweights != nullptr) && weighted == (options.workspace != nullptr),
                "weights, dweights and workspace come together or not at all");
  if (weighted) {
    check.tensor("weights", *options.weights, {DType::f32}, {rows});
    check.tensor("dweights", *options.dweights, {DType::f32}, {rows});
    check.tensor("workspace", *options.workspace, {DType::f32}, {{"size", gemm_m_grouped_dswiglu_workspace_size(x)}});
  }
  if (options.swiglu.limit) check.require(*options.swiglu.limit > 0, "limit must be positive, got ", *options.swiglu.limit);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::gemm_m_grouped_dswiglu(dy, b, offsets, x, options, dx, act, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::gemm_m_grouped_dswiglu(dy, b, offsets, x, options, dx, act, stream);
#endif
    default: check.no_kernel();
  }
}

int64_t gemm_m_grouped_dswiglu_workspace_size(const Tensor& x) {
#ifdef XT_CUDA
  if (x.device.type == DeviceType::cuda) return cuda::gemm_m_grouped_dswiglu_workspace_size(x.shape[0], x.shape[1] / 2);
#endif
  return cpu::gemm_m_grouped_dswiglu_workspace_size(x.shape[0], x.shape[1] / 2);
}

}  // namespace xt
