#include "xtuner/ops/unpermute.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, Stream stream) {
  ArgChecker check("unpermute");
  check.tensor("y", y, data_dtypes, {{"R"}, {"H"}});
  check.tensor("row_of", row_of, {DType::i32}, {{"T"}, {"K"}});
  const Dim tokens = {"T", row_of.shape[0]}, choices = {"K", row_of.shape[1]};
  if (probs) check.tensor("probs", *probs, {DType::f32}, {tokens, choices});
  check.tensor("out", out, {y.dtype}, {tokens, {"H", y.shape[1]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::unpermute(y, row_of, probs, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::unpermute(y, row_of, probs, out, stream);
#endif
    default: check.no_kernel();
  }
}

void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, Stream stream) {
  ArgChecker check("unpermute_bwd");
  check.tensor("dout", dout, data_dtypes, {{"T"}, {"H"}});
  const Dim tokens = {"T", dout.shape[0]}, hidden = {"H", dout.shape[1]};
  check.tensor("src", src, {DType::i32}, {{"R"}});
  const Dim rows = {"R", src.shape[0]};
  if (y) check.tensor("y", *y, {dout.dtype}, {rows, hidden});
  check.tensor("row_of", row_of, {DType::i32}, {tokens, {"K"}});
  const Dim choices = {"K", row_of.shape[1]};
  if (probs) check.tensor("probs", *probs, {DType::f32}, {tokens, choices});
  check.tensor("dy", dy, {dout.dtype}, {rows, hidden});
  if (dprobs) check.tensor("dprobs", *dprobs, {DType::f32}, {tokens, choices});
  check.require(!dprobs || y, "dprobs needs y, got none");
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::unpermute_bwd(dout, y, src, row_of, probs, dy, dprobs, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::unpermute_bwd(dout, y, src, row_of, probs, dy, dprobs, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
