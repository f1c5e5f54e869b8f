#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {

void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, bool accumulate, const Tensor& out, int num_threads) {
  const char* op = "gemm_k_grouped_fp8";
  const int64_t num_m = a.shape[0], num_n = b.shape[0], columns = a.shape[1], num_experts = out.shape[0];
  const int64_t* at = offsets.ptr<int64_t>();
  used_rows(op, offsets, columns);
  const int64_t expert_bytes = num_m * num_n * size_of(out.dtype);
  std::vector<GemmProblem> problems;
  std::vector<int64_t> empty;
  int64_t begin = 0;  // of the expert's columns
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t num_k = at[e + 1] - at[e];  // products with padding would add zero
    const int64_t end = begin + (num_k + KBlocks::scaled - 1) / KBlocks::scaled * KBlocks::scaled;
    if (end > columns) {
      fail(op, ": the padded rows of expert ", e, " end at ", end, ", past the P=", columns, " columns there are");
    }
    if (num_k == 0) {
      empty.push_back(e);
      continue;
    }
    const int64_t block = begin / KBlocks::scaled;
    GemmSide q = {a.ptr<char>() + begin, a.dtype, columns, 1}, v = {b.ptr<char>() + begin, b.dtype, columns, 1};
    q.scale = {scale_a.ptr<float>() + block * num_m, 1, 1, num_m};
    v.scale = {scale_b.ptr<float>() + block * num_n, 1, 1, num_n};
    const GemmOut w = {out.ptr<char>() + e * expert_bytes, out.dtype, num_n, 1, accumulate};
    if (expert_bytes) problems.push_back({q, v, w, num_m, num_n, num_k});
    begin = end;
  }
  run_gemms(problems, num_threads);
  if (accumulate || expert_bytes == 0) return;
  parallel_for(num_threads, static_cast<int64_t>(empty.size()), [&](int64_t i) {
    std::memset(out.ptr<char>() + empty[i] * expert_bytes, 0, static_cast<size_t>(expert_bytes));
  });
}

}  // namespace xt::cpu
