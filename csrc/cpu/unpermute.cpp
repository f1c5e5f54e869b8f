#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

// Every row_of is -1 or a row of y; with `src`, the two maps are each other's inverse, so that no row is written twice.
void check_maps(const char* op, const Tensor& row_of, int64_t rows, const int32_t* src) {
  const int32_t* row = row_of.ptr<int32_t>();
  for (int64_t i = 0; i < row_of.numel(); ++i) {
    if (row[i] < -1 || row[i] >= rows) {
      fail(op, ": row_of[", i / row_of.shape[1], ", ", i % row_of.shape[1], "] must be in [-1, R=", rows, "), got ", row[i]);
    }
    if (src && row[i] >= 0 && src[row[i]] != i) {
      fail(op, ": src and row_of must be each other's inverse, but row_of[", i / row_of.shape[1], ", ",
           i % row_of.shape[1], "]=", row[i], " and src[", row[i], "]=", src[row[i]]);
    }
  }
}

UnpermuteRows common(DType dtype, int64_t hidden, const Tensor& row_of, const Tensor* probs) {
  UnpermuteRows a = {};
  a.dtype = dtype;
  a.hidden = hidden;
  a.num_experts_per_tok = row_of.shape[1];
  a.row_of = row_of.ptr<int32_t>();
  a.probs = probs ? probs->ptr<float>() : nullptr;
  return a;
}

}  // namespace

void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, int num_threads) {
  check_maps("unpermute", row_of, y.shape[0], nullptr);
  UnpermuteRows a = common(y.dtype, y.shape[1], row_of, probs);
  a.y = y.data;
  a.out = out.data;
  const int64_t grain = rows_per_task(row_bytes(y) * (a.num_experts_per_tok + 1));
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, out.shape[0], grain, [&](int64_t begin, int64_t end) { isa.unpermute(a, begin, end); });
}

void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, int num_threads) {
  const int32_t* from = src.ptr<int32_t>();
  check_maps("unpermute_bwd", row_of, dy.shape[0], from);
  UnpermuteRows a = common(dout.dtype, dout.shape[1], row_of, probs);
  a.y = y ? y->data : nullptr;
  a.dout = dout.data;
  a.dy = dy.data;
  a.dprobs = dprobs ? dprobs->ptr<float>() : nullptr;
  const int64_t bytes = row_bytes(dy);
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, dout.shape[0], rows_per_task(bytes * (2 * a.num_experts_per_tok + 1)),
                  [&](int64_t begin, int64_t end) { isa.unpermute_bwd(a, begin, end); });
  parallel_ranges(num_threads, dy.shape[0], rows_per_task(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (from[r] < 0 && bytes) std::memset(dy.ptr<char>() + r * bytes, 0, static_cast<size_t>(bytes));
    }
  });
}

}  // namespace xt::cpu
