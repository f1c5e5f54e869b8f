#include "xtuner/ops/rotary.h"

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {

void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, const Tensor& out, int num_threads) {
  const RotaryTokens a = {x.dtype, x.shape[1], x.shape[2] / 2, x.data, cos.data, sin.data, out.data, back};
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, x.shape[0], rows_per_task(x.shape[1] * x.shape[2] * size_of(x.dtype)),
                  [&](int64_t begin, int64_t end) { isa.rotary(a, begin, end); });
}

}  // namespace xt::cpu
