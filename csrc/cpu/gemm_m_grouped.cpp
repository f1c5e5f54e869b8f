#include <vector>

#include "cpu/cpu.h"
#include "cpu/rows.h"
#include "cpu/simd/bf16.h"

namespace xt::cpu {
static float get(const Tensor& t, int64_t i) { return t.dtype == DType::f32 ? t.ptr<float>()[i] : widen(t.ptr<bf16_t>()[i]); }
static void put(const Tensor& t, int64_t i, float v) { if (t.dtype == DType::f32) t.ptr<float>()[i] = v; else t.ptr<bf16_t>()[i] = narrow(v); }

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b, const Tensor& out, int num_threads) {
  const int64_t used = used_rows("gemm_m_grouped", offsets, a.shape[0]);
  const int64_t kd = a.shape[1], n = out.shape[1], num_experts = b.shape[0];
  const int64_t* at = offsets.ptr<int64_t>();
  std::vector<float> w(b.numel()), x(a.numel());
  for (int64_t e = 0; e < num_experts; ++e)
    for (int64_t k = 0; k < kd; ++k)
      for (int64_t j = 0; j < n; ++j) w[(e * kd + k) * n + j] = get(b, trans_b ? (e * n + j) * kd + k : (e * kd + k) * n + j);
  parallel_for(num_threads, used, [&](int64_t r) {
    int64_t e = 0;
    while (at[e + 1] <= r) ++e;
    std::vector<float> acc(n);
    for (int64_t k = 0; k < kd; ++k) {
      const float v = get(a, r * kd + k);
      for (int64_t j = 0; j < n; ++j) acc[j] += v * w[(e * kd + k) * n + j];
    }
    for (int64_t j = 0; j < n; ++j) put(out, r * n + j, acc[j]);
  });
  zero_rows(out, used, a.shape[0], num_threads);
}
}  // namespace xt::cpu
