#include <vector>

#include "cpu/cpu.h"
#include "cpu/rows.h"
#include "cpu/simd/bf16.h"

namespace xt::cpu {
static float get(const Tensor& t, int64_t i) { return t.dtype == DType::f32 ? t.ptr<float>()[i] : widen(t.ptr<bf16_t>()[i]); }
static void put(const Tensor& t, int64_t i, float v) { if (t.dtype == DType::f32) t.ptr<float>()[i] = v; else t.ptr<bf16_t>()[i] = narrow(v); }

void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const Tensor& out, int num_threads) {
  used_rows("gemm_k_grouped", offsets, a.shape[0]);
  const int64_t m = a.shape[1], n = b.shape[1], num_experts = out.shape[0];
  const int64_t* at = offsets.ptr<int64_t>();
  parallel_for(num_threads, num_experts * m, [&](int64_t em) {
    const int64_t e = em / m, i = em % m;
    if (accumulate && at[e] == at[e + 1]) return;
    std::vector<float> acc(n);
    for (int64_t r = at[e]; r < at[e + 1]; ++r) {
      const float v = get(a, r * m + i);
      for (int64_t j = 0; j < n; ++j) acc[j] += v * get(b, r * n + j);
    }
    for (int64_t j = 0; j < n; ++j) put(out, em * n + j, (accumulate ? get(out, em * n + j) : 0.0f) + acc[j]);
  });
}
}  // namespace xt::cpu
