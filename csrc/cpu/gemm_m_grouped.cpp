#include <limits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

constexpr int64_t few_rows = 128;

char* address(const Tensor& t, int64_t element) { return t.ptr<char>() + element * size_of(t.dtype); }

GemmEpilogue epilogue_of(const GemmMGroupedOptions& options, int64_t expert, int64_t first_row, int64_t num_n) {
  GemmEpilogue e;
  if (options.bias) e.bias = address(*options.bias, expert * num_n);
  if (!options.act) return e;
  e.half = num_n / 2;
  e.act = address(*options.act, first_row * e.half);
  e.act_row = e.half;
  e.alpha = static_cast<float>(options.swiglu.alpha);
  e.limit = static_cast<float>(options.swiglu.limit.value_or(std::numeric_limits<double>::infinity()));
  e.up_offset = static_cast<float>(options.swiglu.up_offset);
  return e;
}

}  // namespace

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b,
                    const GemmMGroupedOptions& options, const Tensor& out, int num_threads) {
  const int64_t num_rows = out.shape[0], num_k = a.shape[1], num_n = out.shape[1], num_experts = b.shape[0];
  const RowGather& gather = options.gather;
  const int64_t used = used_rows("gemm_m_grouped", offsets, num_rows);
  check_gather("gemm_m_grouped", gather, used, a.shape[0]);
  if (options.act) zero_rows(*options.act, used, num_rows, num_threads);
  if (num_k == 0 || num_n == 0) {
    if (!options.accumulate) zero_rows(out, 0, num_rows, num_threads);
    return;
  }

  const std::vector<char> zeros(gather.src ? static_cast<size_t>(num_k * size_of(a.dtype)) : 0);
  const int32_t per_token = static_cast<int32_t>(gather.num_experts_per_tok);
  std::vector<GemmProblem> problems;
  const int64_t* at = offsets.ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = at[e + 1] - at[e];
    if (rows == 0) continue;
    GemmSide x = {address(a, gather.src ? 0 : at[e] * num_k), a.dtype, num_k, 1};
    if (gather.src) x.index = gather.src->ptr<int32_t>() + at[e], x.divisor = per_token, x.zeros = zeros.data();
    const GemmSide w = {address(b, e * num_n * num_k), b.dtype, trans_b ? num_k : 1, trans_b ? 1 : num_n};
    const GemmOut y = {address(out, at[e] * num_n), out.dtype, num_n, 1, options.accumulate};
    const GemmEpilogue epilogue = epilogue_of(options, e, at[e], num_n);
    const int64_t features = epilogue.half ? epilogue.half : num_n;
    // With trans_b the side that plays V must be transposed while packing. For an expert with few rows these rows are
    // the cheaper ones to turn (and its results, which then come out transposed) than its whole weight matrix, which
    // then streams past them from memory. (With a single k a side's lines could run either way, with a single n the
    // output's.)
    if (trans_b && rows <= few_rows && num_k > 1 && num_n > 1) {
      const GemmOut y_turned = {y.data, y.dtype, 1, num_n, options.accumulate};
      problems.push_back({w, x, y_turned, features, rows, num_k, epilogue});
    } else {
      problems.push_back({x, w, y, rows, features, num_k, epilogue});
    }
  }
  run_gemms(problems, num_threads);
  if (!options.accumulate) zero_rows(out, used, num_rows, num_threads);
}

}  // namespace xt::cpu
