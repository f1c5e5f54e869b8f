#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

constexpr int64_t few_rows = 128;

}  // namespace

void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, int num_threads) {
  const int64_t used = used_rows("gemm_m_grouped_fp8", offsets, a.shape[0]);
  const int64_t num_k = a.shape[1], num_n = out.shape[1], num_experts = b.shape[0];
  if (num_k == 0 || num_n == 0) return zero_rows(out, 0, a.shape[0], num_threads);

  std::vector<GemmProblem> problems;
  const int64_t* at = offsets.ptr<int64_t>();
  const int64_t* scale_step = scale_b.strides;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = at[e + 1] - at[e];
    if (rows == 0) continue;
    GemmSide x = {a.ptr<char>() + at[e] * num_k, a.dtype, num_k, 1};
    GemmSide w = {b.ptr<char>() + e * num_n * num_k, b.dtype, num_k, 1};
    x.scale = {scale_a.ptr<float>() + at[e], 1, 1, scale_a.shape[1]};
    w.scale = {scale_b.ptr<float>() + e * scale_step[0], KBlocks::scaled, scale_step[1], scale_step[2]};
    void* y = out.ptr<char>() + at[e] * num_n * size_of(out.dtype);
    // As in gemm_m_grouped: few rows, not the weights, are the side to turn while packing.
    if (rows <= few_rows) {
      problems.push_back({w, x, {y, out.dtype, 1, num_n, false}, num_n, rows, num_k});
    } else {
      problems.push_back({x, w, {y, out.dtype, num_n, 1, false}, rows, num_n, num_k});
    }
  }
  run_gemms(problems, num_threads);
  zero_rows(out, used, a.shape[0], num_threads);
}

}  // namespace xt::cpu
