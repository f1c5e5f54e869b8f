#include "cpu/cpu.h"
#include "cpu/rows.h"

namespace xt::cpu {

void permute(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& out, int num_threads) {
  const int64_t bytes = row_bytes(x), rows = src.shape[0];
  const int64_t choices = x.shape[0] * num_experts_per_tok;
  const int32_t* from = src.ptr<int32_t>();
  FirstBad bad;
  parallel_ranges(num_threads, rows, rows_per_task(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (from[r] < -1 || from[r] >= choices) return bad.report(r);
      if (bytes == 0) continue;
      char* to = out.ptr<char>() + r * bytes;
      if (from[r] < 0) {
        std::memset(to, 0, static_cast<size_t>(bytes));
      } else {
        std::memcpy(to, x.ptr<char>() + from[r] / num_experts_per_tok * bytes, static_cast<size_t>(bytes));
      }
    }
  });
  if (bad.any()) {
    fail("permute: src[", bad.at(), "] must be in [-1, T*K=", choices, "), got ", from[bad.at()]);
  }
}

}  // namespace xt::cpu
