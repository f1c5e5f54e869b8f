// Helpers for kernels that move whole rows.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/thread_pool.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

// Rows per task, so that a task moves about 64 KiB: enough to pay for handing it out, little enough to balance.
inline int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, row_bytes));
}

// The same for plain copies, which move 64 KiB in little more time than it takes to hand a task out.
inline int64_t rows_per_copy_task(int64_t row_bytes) { return rows_per_task(row_bytes / 4); }

inline int64_t row_bytes(const Tensor& t) { return t.shape[1] * size_of(t.dtype); }

// t[begin:end] = 0
inline void zero_rows(const Tensor& t, int64_t begin, int64_t end, int num_threads) {
  const int64_t bytes = row_bytes(t);
  parallel_ranges(num_threads, end - begin, rows_per_task(bytes), [&](int64_t b, int64_t e) {
    if (bytes) std::memset(t.ptr<char>() + (begin + b) * bytes, 0, static_cast<size_t>((e - b) * bytes));
  });
}

// The smallest index that breaks a rule, found by many threads: the same error whatever the thread count.
class FirstBad {
 public:
  void report(int64_t index) {
    int64_t seen = at_.load(std::memory_order_relaxed);
    while (index < seen && !at_.compare_exchange_weak(seen, index, std::memory_order_relaxed)) {
    }
  }
  bool any() const { return at() != none; }
  int64_t at() const { return at_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t none = INT64_MAX;
  std::atomic<int64_t> at_{none};
};

}  // namespace xt::cpu
