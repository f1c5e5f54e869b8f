#include "xtuner/ops/ep_combine.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/ep_checks.h"

namespace xt {

void ep_combine(const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor* probs, const Tensor& out,
                Stream stream) {
  ArgChecker check("ep_combine");
  check.tensor("y", y, data_dtypes, {{"R"}, {"H"}});
  check.tensor("out", out, {y.dtype}, {{"T"}, {"H", y.shape[1]}});
  check_route(check, route, peers, out.shape[0]);
  check_shared(check, "y", y, peers);
  if (probs) check.tensor("probs", *probs, {DType::f32}, {{"T", out.shape[0]}, {"K", route.dest.shape[1]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::ep_combine(y, route, peers, probs, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::ep_combine(y, route, peers, probs, out, stream);
#endif
    default: check.no_kernel();
  }
}

void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, Stream stream) {
  ArgChecker check("ep_combine_bwd");
  check.tensor("dout", dout, data_dtypes, {{"T"}, {"H"}});
  const Dim num_tokens = {"T", dout.shape[0]}, hidden = {"H", dout.shape[1]};
  check.tensor("y", y, {dout.dtype}, {{"R"}, hidden});
  check_route(check, route, peers, dout.shape[0]);
  check_shared(check, "y", y, peers);
  const Dim choices = {"K", route.dest.shape[1]};
  check.tensor("probs", probs, {DType::f32}, {num_tokens, choices});
  check.tensor("dy", dy, {dout.dtype}, {{"R", y.shape[0]}, hidden});
  check_shared(check, "dy", dy, peers);
  check.tensor("dprobs", dprobs, {DType::f32}, {num_tokens, choices});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::ep_combine_bwd(dout, y, route, peers, probs, dy, dprobs, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::ep_combine_bwd(dout, y, route, peers, probs, dy, dprobs, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
