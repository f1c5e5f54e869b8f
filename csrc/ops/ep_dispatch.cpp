#include "xtuner/ops/ep_dispatch.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/ep_checks.h"

namespace xt {

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream) {
  ArgChecker check("ep_dispatch");
  check.tensor("x", x, {DType::f32, DType::bf16, DType::e4m3, DType::e5m2}, {{"T"}, {"H"}});
  check.tensor("out", out, {x.dtype}, {{"R"}, {"H", x.shape[1]}});
  check_route(check, route, peers, x.shape[0]);
  check_shared(check, "out", out, peers);
  check.require(!scales == !out_scales, "scales and out_scales must both be given or both be left out");
  if (scales) {
    check.tensor("scales", *scales, {DType::f32}, {{"S"}, {"ld"}});
    check.tensor("out_scales", *out_scales, {DType::f32}, {{"S", scales->shape[0]}, {"ld'"}});
    check.require(scales->shape[1] >= x.shape[0] && out_scales->shape[1] >= out.shape[0],
                  "scales and out_scales must have a column for each of the ", x.shape[0], " tokens and ", out.shape[0],
                  " rows, got ", scales->shape[1], " and ", out_scales->shape[1]);
    check_shared(check, "out_scales", *out_scales, peers);
  }
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::ep_dispatch(x, scales, route, peers, out, out_scales, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::ep_dispatch(x, scales, route, peers, out, out_scales, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
