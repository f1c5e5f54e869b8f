#include "cpu/cpu.h"
#include "cpu/scatter.h"

namespace xt::cpu {

void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, int num_threads) {
  UnpermuteRows a = routed_rows(x.dtype, x.shape[1], row_of, nullptr);
  a.dout = x.data;
  scatter("permute", a, row_of, src, out, num_threads);
}

}  // namespace xt::cpu
