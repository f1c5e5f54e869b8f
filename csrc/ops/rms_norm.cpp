#include "xtuner/ops/rms_norm.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& inverse_rms,
              Stream stream) {
  ArgChecker check("rms_norm");
  check.tensor("x", x, data_dtypes, {{"R"}, {"D"}});
  const Dim rows = {"R", x.shape[0]}, width = {"D", x.shape[1]};
  check.tensor("weight", weight, {x.dtype}, {width});
  check.tensor("out", out, {x.dtype}, {rows, width});
  check.tensor("inverse_rms", inverse_rms, {DType::f32}, {rows});
  check.require(x.shape[1] > 0, "x must have at least one column, got none");
  check.require(eps >= 0, "eps must not be negative, got ", eps);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::rms_norm(x, weight, eps, out, inverse_rms, stream.num_threads);
    default: check.no_kernel();
  }
}

void rms_norm_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& inverse_rms,
                  const Tensor& dx, const Tensor& dweight, const Tensor& workspace, Stream stream) {
  ArgChecker check("rms_norm_bwd");
  check.tensor("dout", dout, data_dtypes, {{"R"}, {"D"}});
  const Dim rows = {"R", dout.shape[0]}, width = {"D", dout.shape[1]};
  const Dim blocks = {"R/128", (dout.shape[0] + rms_norm_block_rows - 1) / rms_norm_block_rows};
  check.tensor("x", x, {dout.dtype}, {rows, width});
  check.tensor("weight", weight, {dout.dtype}, {width});
  check.tensor("inverse_rms", inverse_rms, {DType::f32}, {rows});
  check.tensor("dx", dx, {dout.dtype}, {rows, width});
  check.tensor("dweight", dweight, {dout.dtype}, {width});
  check.tensor("workspace", workspace, {DType::f32}, {blocks, width});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::rms_norm_bwd(dout, x, weight, inverse_rms, dx, dweight, workspace, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
