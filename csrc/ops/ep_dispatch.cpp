#include "xtuner/ops/ep_dispatch.h"

#include "cpu/cpu.h"
#include "ops/ep_checks.h"

namespace xt {

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream) {
  ArgChecker check("ep_dispatch");
  check.tensor("x", x, data_dtypes, {{"T"}, {"H"}});
  check.tensor("out", out, {x.dtype}, {{"R"}, {"H", x.shape[1]}});
  check_route(check, route, peers, x.shape[0], out.shape[0]);
  check.require(!scales == !out_scales, "scales and out_scales must both be given or both be left out");
  if (scales) {
    check.tensor("scales", *scales, {DType::f32}, {{"T", x.shape[0]}, {"S"}});
    check.tensor("out_scales", *out_scales, {DType::f32}, {{"R", out.shape[0]}, {"S", scales->shape[1]}});
  }
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::ep_dispatch(x, scales, route, peers, out, out_scales, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
