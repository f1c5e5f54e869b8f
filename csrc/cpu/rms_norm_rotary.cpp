#include "xtuner/ops/rms_norm_rotary.h"

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/sum_blocks.h"
#include "xtuner/ops/rms_norm.h"

namespace xt::cpu {

// Both kernels run over few enough rows at a time that the second finds in cache what the first has written.

void rms_norm_rotary(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps,
                     const Tensor& out, const Tensor& inverse_rms, int num_threads) {
  const int64_t heads = x.shape[1], width = x.shape[2];
  RmsNormRows norm = {};
  norm.dtype = x.dtype;
  norm.width = width;
  norm.x = x.data;
  norm.weight = weight.data;
  norm.eps = static_cast<float>(eps);
  norm.out = out.data;
  norm.inverse_rms = inverse_rms.ptr<float>();
  const RotaryTokens turn = {x.dtype, heads, width / 2, out.data, cos.data, sin.data, out.data, false};
  const Kernels& isa = kernels();
  const int64_t tokens_per_task = std::max<int64_t>(1, rows_per_task(heads * width * size_of(x.dtype)) / 4);
  parallel_ranges(num_threads, x.shape[0], tokens_per_task, [&](int64_t begin, int64_t end) {
    isa.rms_norm(norm, begin * heads, end * heads);
    isa.rotary(turn, begin, end);
  });
}

void rms_norm_rotary_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& cos,
                         const Tensor& sin, const Tensor& inverse_rms, const Tensor& dx, const Tensor& dweight,
                         const Tensor& workspace, int num_threads) {
  const int64_t heads = x.shape[1], width = x.shape[2], bytes = size_of(x.dtype);
  RmsNormRows norm = {};
  norm.dtype = x.dtype;
  norm.width = width;
  norm.x = x.data;
  norm.weight = weight.data;
  norm.dout = dx.data;  // turned back
  norm.out = dx.data;
  norm.inverse_rms = inverse_rms.ptr<float>();
  const Kernels& isa = kernels();
  // The heads of token t from row `begin` up to `end`, of which a block may hold a part.
  const auto turn_back = [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t at = begin * width * bytes, table = t * (width / 2) * bytes;
    isa.rotary({x.dtype, end - begin, width / 2, dout.ptr<char>() + at, cos.ptr<char>() + table,
                sin.ptr<char>() + table, dx.ptr<char>() + at, true},
               0, 1);
  };
  parallel_ranges(num_threads, x.shape[0] * heads, rms_norm_block_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t t = row / heads, next = std::min(end, (t + 1) * heads);
      turn_back(t, row, next);
      row = next;
    }
    isa.rms_norm_bwd(norm, begin, end, workspace.ptr<float>() + begin / rms_norm_block_rows * width);
  });
  sum_blocks(workspace, dweight);
}

}  // namespace xt::cpu
