#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {

void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const Tensor& out,
                    int num_threads) {
  used_rows("gemm_k_grouped", offsets, a.shape[0]);
  const int64_t num_m = a.shape[1], num_n = b.shape[1], num_experts = out.shape[0];
  if (num_m == 0 || num_n == 0) return;
  const int64_t expert_bytes = num_m * num_n * size_of(out.dtype), in_size = size_of(a.dtype);

  std::vector<GemmProblem> problems;
  std::vector<int64_t> empty;
  const int64_t* at = offsets.ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e) {
    if (at[e] == at[e + 1]) {
      empty.push_back(e);
      continue;
    }
    const GemmSide q = {a.ptr<char>() + at[e] * num_m * in_size, a.dtype, 1, num_m};
    const GemmSide v = {b.ptr<char>() + at[e] * num_n * in_size, b.dtype, 1, num_n};
    const GemmOut w = {out.ptr<char>() + e * expert_bytes, out.dtype, num_n, 1, accumulate};
    problems.push_back({q, v, w, num_m, num_n, at[e + 1] - at[e]});
  }
  run_gemms(problems, num_threads);
  if (accumulate) return;
  parallel_for(num_threads, static_cast<int64_t>(empty.size()), [&](int64_t i) {
    std::memset(out.ptr<char>() + empty[i] * expert_bytes, 0, static_cast<size_t>(expert_bytes));
  });
}

}  // namespace xt::cpu
