#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

constexpr int64_t few_rows = 128;

char* address(const Tensor& t, int64_t element) { return t.ptr<char>() + element * size_of(t.dtype); }

}  // namespace

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out,
                    int num_threads) {
  const int64_t used = used_rows("gemm_m_grouped", offsets, a.shape[0]);
  const int64_t num_k = a.shape[1], num_n = out.shape[1], num_experts = b.shape[0];
  if (num_k == 0 || num_n == 0) return zero_rows(out, 0, a.shape[0], num_threads);

  std::vector<GemmProblem> problems;
  const int64_t* at = offsets.ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = at[e + 1] - at[e];
    if (rows == 0) continue;
    const GemmSide x = {address(a, at[e] * num_k), a.dtype, num_k, 1};
    const GemmSide w = {address(b, e * num_n * num_k), b.dtype, trans_b ? num_k : 1, trans_b ? 1 : num_n};
    const GemmOut y = {address(out, at[e] * num_n), out.dtype, num_n, 1, false};
    // With trans_b the side that plays V must be transposed while packing. For an expert with few rows these rows are
    // the cheaper ones to turn (and its results, which then come out transposed) than its whole weight matrix, which
    // then streams past them from memory.
    if (trans_b && rows <= few_rows) {
      const GemmOut y_turned = {y.data, y.dtype, 1, num_n, false};
      problems.push_back({w, x, y_turned, num_n, rows, num_k});
    } else {
      problems.push_back({x, w, y, rows, num_n, num_k});
    }
  }
  run_gemms(problems, num_threads);
  zero_rows(out, used, a.shape[0], num_threads);
}

}  // namespace xt::cpu
