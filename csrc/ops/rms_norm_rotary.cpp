#include "xtuner/ops/rms_norm_rotary.h"

#include "cpu/cpu.h"
#include "ops/checks.h"
#include "xtuner/ops/rms_norm.h"

namespace xt {
namespace {

void check_heads(ArgChecker& check, const char* name, const Tensor& x, const Tensor& weight, const Tensor& cos,
                 const Tensor& sin) {
  check.tensor(name, x, data_dtypes, {{"T"}, {"H"}, {"D"}});
  const int64_t features = x.shape[2];
  check.require(features > 0 && features % 2 == 0, name, " must have an even number of features per head, got ",
                features);
  const Dim tokens = {"T", x.shape[0]}, half = {"D/2", features / 2};
  check.tensor("weight", weight, {x.dtype}, {{"D", features}});
  check.tensor("cos", cos, {x.dtype}, {tokens, half});
  check.tensor("sin", sin, {x.dtype}, {tokens, half});
}

}  // namespace

void rms_norm_rotary(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps,
                     const Tensor& out, const Tensor& inverse_rms, Stream stream) {
  ArgChecker check("rms_norm_rotary");
  check_heads(check, "x", x, weight, cos, sin);
  const Dim tokens = {"T", x.shape[0]}, heads = {"H", x.shape[1]};
  check.tensor("out", out, {x.dtype}, {tokens, heads, {"D", x.shape[2]}});
  check.tensor("inverse_rms", inverse_rms, {DType::f32}, {tokens, heads});
  check.require(eps >= 0, "eps must not be negative, got ", eps);
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::rms_norm_rotary(x, weight, cos, sin, eps, out, inverse_rms, stream.num_threads);
    default: check.no_kernel();
  }
}

void rms_norm_rotary_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& cos,
                         const Tensor& sin, const Tensor& inverse_rms, const Tensor& dx, const Tensor& dweight,
                         const Tensor& workspace, Stream stream) {
  ArgChecker check("rms_norm_rotary_bwd");
  check_heads(check, "dout", dout, weight, cos, sin);
  const Dim tokens = {"T", dout.shape[0]}, heads = {"H", dout.shape[1]}, width = {"D", dout.shape[2]};
  const int64_t rows = dout.shape[0] * dout.shape[1];
  const Dim blocks = {"T*H/128", (rows + rms_norm_block_rows - 1) / rms_norm_block_rows};
  check.tensor("x", x, {dout.dtype}, {tokens, heads, width});
  check.tensor("inverse_rms", inverse_rms, {DType::f32}, {tokens, heads});
  check.tensor("dx", dx, {dout.dtype}, {tokens, heads, width});
  check.tensor("dweight", dweight, {dout.dtype}, {width});
  check.tensor("workspace", workspace, {DType::f32}, {blocks, width});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::rms_norm_rotary_bwd(dout, x, weight, cos, sin, inverse_rms, dx, dweight, workspace,
                                      stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
