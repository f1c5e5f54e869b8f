#include <limits>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {

SwigluRows swiglu_rows_of(const Tensor& x, const SwigluParams& params) {
  SwigluRows a = {};
  a.dtype = x.dtype;
  a.width = x.shape[1] / 2;
  a.row = x.shape[1];
  a.up = a.width;
  a.x = x.data;
  a.alpha = static_cast<float>(params.alpha);
  a.limit = static_cast<float>(params.limit.value_or(std::numeric_limits<double>::infinity()));
  a.up_offset = static_cast<float>(params.up_offset);
  return a;
}

void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, int num_threads) {
  const int64_t rows = x.shape[0], used = offsets ? used_rows("swiglu", *offsets, rows) : rows;
  SwigluRows a = swiglu_rows_of(x, params);
  a.out = out.data;
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, used, rows_per_task(row_bytes(x)),
                  [&](int64_t begin, int64_t end) { isa.swiglu(a, begin, end); });
  zero_rows(out, used, rows, num_threads);
}

void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, int num_threads) {
  const int64_t rows = x.shape[0], used = offsets ? used_rows("swiglu_bwd", *offsets, rows) : rows;
  SwigluRows a = swiglu_rows_of(x, params);
  a.dout = dout.data;
  a.out = dx.data;
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, used, rows_per_task(row_bytes(x)),
                  [&](int64_t begin, int64_t end) { isa.swiglu_bwd(a, begin, end); });
  zero_rows(dx, used, rows, num_threads);
}

}  // namespace xt::cpu
