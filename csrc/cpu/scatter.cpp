#include "cpu/scatter.h"

#include "cpu/cache.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

struct Maps {
  const int32_t *row_of, *src;
  int64_t choices, rows;

  bool good_choice(int64_t i) const {
    const int64_t r = row_of[i];
    return r == -1 || (r >= 0 && r < rows && src[r] == i);
  }
  bool good_row(int64_t r) const {
    const int64_t i = src[r];
    return i == -1 || (i >= 0 && i < choices && row_of[i] == r);
  }
};

[[noreturn]] void fail_choice(const char* op, const Maps& m, int64_t i, int64_t k_count) {
  const int64_t row = m.row_of[i];
  if (row < -1 || row >= m.rows) {
    fail(op, ": row_of[", i / k_count, ", ", i % k_count, "] must be in [-1, R=", m.rows, "), got ", row);
  }
  fail(op, ": src and row_of must be each other's inverse, but row_of[", i / k_count, ", ", i % k_count, "]=", row,
       " and src[", row, "]=", m.src[row]);
}

[[noreturn]] void fail_row(const char* op, const Maps& m, int64_t r, int64_t k_count) {
  const int64_t i = m.src[r];
  if (i < -1 || i >= m.choices) fail(op, ": src[", r, "] must be in [-1, T*K=", m.choices, "), got ", i);
  fail(op, ": src and row_of must be each other's inverse, but src[", r, "]=", i, " and row_of[", i / k_count, ", ",
       i % k_count, "]=", m.row_of[i]);
}

}  // namespace

UnpermuteRows routed_rows(DType dtype, int64_t hidden, const Tensor& row_of, const Tensor* probs) {
  UnpermuteRows a = {};
  a.dtype = dtype;
  a.hidden = hidden;
  a.num_experts_per_tok = row_of.shape[1];
  a.row_of = row_of.ptr<int32_t>();
  a.probs = probs ? probs->ptr<float>() : nullptr;
  return a;
}

void scatter(const char* op, UnpermuteRows a, const Tensor& row_of, const Tensor& src, const Tensor& out,
             int num_threads) {
  const Maps maps = {row_of.ptr<int32_t>(), src.ptr<int32_t>(), row_of.numel(), src.shape[0]};
  const int64_t tokens = row_of.shape[0], k_count = row_of.shape[1], bytes = row_bytes(out);
  a.dy = out.data;
  a.stream = worth_streaming(out);
  const Kernels& isa = kernels();
  FirstBad bad_choice, bad_row;
  const auto write_tokens = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k_count; i < end * k_count; ++i) {
      if (!maps.good_choice(i)) return bad_choice.report(i);
    }
    isa.unpermute_bwd(a, begin, end);
  };
  const auto zero_unowned = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (!maps.good_row(r)) return bad_row.report(r);
      if (maps.src[r] < 0 && bytes) std::memset(out.ptr<char>() + r * bytes, 0, static_cast<size_t>(bytes));
    }
  };
  const int64_t read_per_row = a.dprobs ? 1 : 0;
  parallel_ranges(num_threads, tokens, rows_per_copy_task(bytes * (1 + (1 + read_per_row) * k_count)), write_tokens);
  parallel_ranges(num_threads, maps.rows, 16 * rows_per_copy_task(bytes), zero_unowned);  // few rows are unowned
  if (bad_choice.any()) fail_choice(op, maps, bad_choice.at(), k_count);
  if (bad_row.any()) fail_row(op, maps, bad_row.at(), k_count);
}

}  // namespace xt::cpu
