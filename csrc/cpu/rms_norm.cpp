#include "xtuner/ops/rms_norm.h"

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/sum_blocks.h"

namespace xt::cpu {
void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& inverse_rms,
              int num_threads) {
  RmsNormRows a = {};
  a.dtype = x.dtype;
  a.width = x.shape[1];
  a.x = x.data;
  a.weight = weight.data;
  a.eps = static_cast<float>(eps);
  a.out = out.data;
  a.inverse_rms = inverse_rms.ptr<float>();
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, x.shape[0], rows_per_task(row_bytes(x)),
                  [&](int64_t begin, int64_t end) { isa.rms_norm(a, begin, end); });
}

void rms_norm_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& inverse_rms,
                  const Tensor& dx, const Tensor& dweight, const Tensor& workspace, int num_threads) {
  RmsNormRows a = {};
  a.dtype = x.dtype;
  a.width = x.shape[1];
  a.x = x.data;
  a.weight = weight.data;
  a.dout = dout.data;
  a.out = dx.data;
  a.inverse_rms = inverse_rms.ptr<float>();
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, x.shape[0], rms_norm_block_rows, [&](int64_t begin, int64_t end) {
    isa.rms_norm_bwd(a, begin, end, workspace.ptr<float>() + begin / rms_norm_block_rows * a.width);
  });
  sum_blocks(workspace, dweight);
}

}  // namespace xt::cpu
