#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/simd/bf16.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {
namespace {

// An expert with many rows but a small gradient gives few tiles to share out: its rows are cut into parts whose sums
// are added up in order. Depends on shapes alone, because it decides the order of summation.
constexpr int64_t part_rows = 4096;
constexpr int64_t small_gradient = 65536;  // elements

struct SplitExpert {
  int64_t expert, num_parts;
  std::vector<float> sums;  // [num_parts, M, N]
};

// out = (out +) the parts' sums in order
template <class T>
void add_parts(const SplitExpert& split, int64_t elements, bool accumulate, T* out) {
  for (int64_t i = 0; i < elements; ++i) {
    float sum = split.sums[i];
    for (int64_t part = 1; part < split.num_parts; ++part) sum += split.sums[part * elements + i];
    if constexpr (sizeof(T) == 4) {
      out[i] = accumulate ? out[i] + sum : sum;
    } else {
      out[i] = narrow(accumulate ? widen(out[i]) + sum : sum);
    }
  }
}

}  // namespace

void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const RowGather& gather_b,
                    const Tensor& out, int num_threads) {
  const int64_t used = used_rows("gemm_k_grouped", offsets, a.shape[0]);
  check_gather("gemm_k_grouped", gather_b, used, b.shape[0]);
  const int64_t num_m = a.shape[1], num_n = b.shape[1], num_experts = out.shape[0], elements = num_m * num_n;
  if (elements == 0) return;
  const int64_t in_size = size_of(a.dtype), expert_bytes = elements * size_of(out.dtype);
  const std::vector<char> zeros(gather_b.src ? static_cast<size_t>(num_n * in_size) : 0);
  const int32_t per_token = static_cast<int32_t>(gather_b.num_experts_per_tok);

  const auto problem = [&](int64_t first, int64_t rows, const GemmOut& w) {
    const GemmSide q = {a.ptr<char>() + first * num_m * in_size, a.dtype, 1, num_m};
    GemmSide v = {b.ptr<char>() + (gather_b.src ? 0 : first * num_n * in_size), b.dtype, 1, num_n};
    if (gather_b.src) v.index = gather_b.src->ptr<int32_t>() + first, v.divisor = per_token, v.zeros = zeros.data();
    return GemmProblem{q, v, w, num_m, num_n, rows};
  };
  std::vector<GemmProblem> problems;
  std::vector<SplitExpert> splits;
  std::vector<int64_t> empty;
  const int64_t* at = offsets.ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = at[e + 1] - at[e];
    if (rows == 0) {
      empty.push_back(e);
    } else if (rows > part_rows && elements <= small_gradient) {
      const int64_t num_parts = (rows + part_rows - 1) / part_rows;
      splits.push_back({e, num_parts, std::vector<float>(static_cast<size_t>(num_parts * elements))});
      for (int64_t part = 0; part < num_parts; ++part) {
        const int64_t first = part * part_rows, n = first + part_rows < rows ? part_rows : rows - first;
        const GemmOut w = {splits.back().sums.data() + part * elements, DType::f32, num_n, 1, false};
        problems.push_back(problem(at[e] + first, n, w));
      }
    } else {
      const GemmOut w = {out.ptr<char>() + e * expert_bytes, out.dtype, num_n, 1, accumulate};
      problems.push_back(problem(at[e], rows, w));
    }
  }
  run_gemms(problems, num_threads);
  parallel_for(num_threads, static_cast<int64_t>(splits.size()), [&](int64_t i) {
    char* to = out.ptr<char>() + splits[i].expert * expert_bytes;
    if (out.dtype == DType::f32) {
      add_parts(splits[i], elements, accumulate, reinterpret_cast<float*>(to));
    } else {
      add_parts(splits[i], elements, accumulate, reinterpret_cast<bf16_t*>(to));
    }
  });
  if (accumulate) return;
  parallel_for(num_threads, static_cast<int64_t>(empty.size()), [&](int64_t i) {
    std::memset(out.ptr<char>() + empty[i] * expert_bytes, 0, static_cast<size_t>(expert_bytes));
  });
}

}  // namespace xt::cpu
