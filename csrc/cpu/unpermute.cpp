#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/rows.h"
#include "cpu/scatter.h"

namespace xt::cpu {

void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, int num_threads) {
  UnpermuteRows a = routed_rows(y.dtype, y.shape[1], row_of, probs);
  a.y = y.data;
  a.out = out.data;
  a.stream = worth_streaming(out);
  a.far = y.shape[0] * row_bytes(y) > last_level_cache() / 4;
  const int64_t rows = y.shape[0], k_count = a.num_experts_per_tok;
  const Kernels& isa = kernels();
  FirstBad bad;
  parallel_ranges(num_threads, out.shape[0], rows_per_copy_task(row_bytes(y) * (k_count + 1)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin * k_count; i < end * k_count; ++i) {
                      if (a.row_of[i] < -1 || a.row_of[i] >= rows) return bad.report(i);
                    }
                    isa.unpermute(a, begin, end);
                  });
  if (bad.any()) {
    fail("unpermute: row_of[", bad.at() / k_count, ", ", bad.at() % k_count, "] must be in [-1, R=", rows, "), got ",
         a.row_of[bad.at()]);
  }
}

void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, int num_threads) {
  UnpermuteRows a = routed_rows(dout.dtype, dout.shape[1], row_of, probs);
  a.y = y ? y->data : nullptr;
  a.dout = dout.data;
  a.dprobs = dprobs ? dprobs->ptr<float>() : nullptr;
  scatter("unpermute_bwd", a, row_of, src, dy, num_threads);
}

}  // namespace xt::cpu
