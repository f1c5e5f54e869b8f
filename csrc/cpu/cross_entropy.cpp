#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {

void cross_entropy(const Tensor& logits, const Tensor& labels, const Tensor& weights, bool gradient,
                   const Tensor& losses, int num_threads) {
  const int64_t tokens = logits.shape[0], vocab = logits.shape[1];
  const int64_t* label = labels.ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    if (label[t] < 0 || label[t] >= vocab) {
      fail("cross_entropy: labels[", t, "] must be in [0, V=", vocab, "), got ", label[t]);
    }
  }
  const CrossEntropyRows a = {logits.dtype, vocab, logits.data, label, weights.ptr<float>(), losses.ptr<float>(),
                              gradient};
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, tokens, rows_per_task(row_bytes(logits)),
                  [&](int64_t begin, int64_t end) { isa.cross_entropy(a, begin, end); });
}

}  // namespace xt::cpu
