#include "xtuner/ops/swiglu.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

static void check_common(ArgChecker& check, const Tensor& x, const Tensor* offsets, const SwigluParams& params) {
  check.tensor("x", x, data_dtypes, {{"R"}, {"2I"}});
  check.require(x.shape[1] % 2 == 0, "x must have an even number of columns (gate, then up), got ", x.shape[1]);
  if (offsets) {
    check.tensor("offsets", *offsets, {DType::i64}, {{"E+1"}});
    check.require(offsets->shape[0] >= 1, "offsets must hold E+1 values, got none");
  }
  if (params.limit) check.require(*params.limit > 0, "limit must be positive, got ", *params.limit);
}

void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, Stream stream) {
  ArgChecker check("swiglu");
  check_common(check, x, offsets, params);
  check.tensor("out", out, {x.dtype}, {{"R", x.shape[0]}, {"I", x.shape[1] / 2}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::swiglu(x, offsets, params, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::swiglu(x, offsets, params, out, stream);
#endif
    default: check.no_kernel();
  }
}

void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, Stream stream) {
  ArgChecker check("swiglu_bwd");
  check_common(check, x, offsets, params);
  check.tensor("dout", dout, {x.dtype}, {{"R", x.shape[0]}, {"I", x.shape[1] / 2}});
  check.tensor("dx", dx, {x.dtype}, {{"R", x.shape[0]}, {"2I", x.shape[1]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::swiglu_bwd(dout, x, offsets, params, dx, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::swiglu_bwd(dout, x, offsets, params, dx, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
