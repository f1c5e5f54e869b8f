#include "xtuner/ops/rotary.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, const Tensor& out, Stream stream) {
  ArgChecker check("rotary");
  check.tensor("x", x, data_dtypes, {{"T"}, {"H"}, {"D"}});
  check.require(x.shape[2] % 2 == 0, "x must have an even number of features per head, got ", x.shape[2]);
  const Dim tokens = {"T", x.shape[0]}, half = {"D/2", x.shape[2] / 2};
  check.tensor("cos", cos, {x.dtype}, {tokens, half});
  check.tensor("sin", sin, {x.dtype}, {tokens, half});
  check.tensor("out", out, {x.dtype}, {tokens, {"H", x.shape[1]}, {"D", x.shape[2]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::rotary(x, cos, sin, back, out, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
