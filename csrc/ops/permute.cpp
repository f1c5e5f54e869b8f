#include "xtuner/ops/permute.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, Stream stream) {
  ArgChecker check("permute");
  check.tensor("x", x, data_dtypes, {{"T"}, {"H"}});
  check.tensor("row_of", row_of, {DType::i32}, {{"T", x.shape[0]}, {"K"}});
  check.tensor("src", src, {DType::i32}, {{"R"}});
  check.tensor("out", out, {x.dtype}, {{"R", src.shape[0]}, {"H", x.shape[1]}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::permute(x, row_of, src, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::permute(x, row_of, src, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
