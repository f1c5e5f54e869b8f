// The kernels' templates at the shape AVX-512 gives them (16 floats, 14 rows per register tile, transposes of 8), on a
// Vec of plain arrays, so that everything but the intrinsics of that instruction set is tested on any machine.
#include "cpu/simd/gemm_tile.h"
#include "cpu/simd/swiglu.h"
#include "cpu/simd/unpermute.h"
#include "helpers.h"

namespace xt::cpu {
namespace {

struct Wide {
  static constexpr int width = 16, tile_rows = 14, thin_tile_rows = 14, block = 8;
  using Half = Wide;
  float v[width];

  template <class F>
  static Wide each(F f) {
    Wide r;
    for (int i = 0; i < width; ++i) r.v[i] = f(i);
    return r;
  }
  static Wide zero() { return all(0); }
  static Wide all(float x) {
    return each([&](int) { return x; });
  }
  static Wide all_upper(const bf16_t* p) { return all(widen(p[1])); }
  static Wide load(const e4m3_t* p) {
    return each([&](int i) { return static_cast<float>(test::fp8_value(DType::e4m3, p[i].bits)); });
  }
  static Wide load(const e5m2_t* p) {
    return each([&](int i) { return static_cast<float>(test::fp8_value(DType::e5m2, p[i].bits)); });
  }
  template <class T>
  static Wide load(const T* p) {
    return each([&](int i) { return as_float(p + i); });
  }
  template <class T>
  static Wide load(const T* p, int n) {
    return each([&](int i) { return i < n ? as_float(p + i) : 0.0f; });
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
  static void fence() {}
  void store(float* p, int n = width) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  void store(bf16_t* p, int n = width) const {
    for (int i = 0; i < n; ++i) p[i] = narrow(v[i]);
  }
  static void load_pair(const bf16_t* p, Wide& even, Wide& odd) {
    even = each([&](int i) { return widen(p[2 * i]); });
    odd = each([&](int i) { return widen(p[2 * i + 1]); });
  }
  static void store_pair(bf16_t* p, Wide even, Wide odd) {
    for (int i = 0; i < width; ++i) p[2 * i] = narrow(even.v[i]), p[2 * i + 1] = narrow(odd.v[i]);
  }
  static void stream_pair(bf16_t* p, Wide even, Wide odd) { store_pair(p, even, odd); }
  template <class Unit, class T>
  static void transpose(const T* const* rows, int64_t at, float* to, int64_t to_row) {
    for (int i = 0; i < block; ++i) {
      for (int j = 0; j < block; ++j) to[j * to_row + i] = as_float(rows[i] + at + j);
    }
  }
};

Wide operator+(Wide a, Wide b) {
  return Wide::each([&](int i) { return a.v[i] + b.v[i]; });
}
Wide operator-(Wide a, Wide b) {
  return Wide::each([&](int i) { return a.v[i] - b.v[i]; });
}
Wide operator*(Wide a, Wide b) {
  return Wide::each([&](int i) { return a.v[i] * b.v[i]; });
}
Wide operator/(Wide a, Wide b) {
  return Wide::each([&](int i) { return a.v[i] / b.v[i]; });
}
Wide fma(Wide a, Wide b, Wide c) {
  return Wide::each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
Wide select_gt(Wide a, Wide b, Wide x, Wide y) {
  return Wide::each([&](int i) { return a.v[i] > b.v[i] ? x.v[i] : y.v[i]; });
}
Wide exp2_of_biased(Wide t) {
  return Wide::each([&](int i) { return std::ldexp(1.0f, static_cast<int>(t.v[i] - 12582912.0f)); });
}
float sum(Wide a) {
  float s = 0;
  for (float x : a.v) s += x;
  return s;
}

using test::Array;

// One tile, whichever way its operands and its output lie.
void check_tile(int64_t num_q, int64_t num_v, int64_t num_k, bool q_along_k, bool v_along_k, bool out_along_v, DType in,
                DType out_dtype, bool accumulate, test::Rng& rng) {
  const Array q = Array(in, {num_q, num_k}).randomise(rng), v = Array(in, {num_v, num_k}).randomise(rng);
  Array out(out_dtype, {num_q, num_v});
  if (accumulate) out.randomise(rng);
  const Array start = out;
  const auto side = [&](const Array& a, int64_t rows, bool along_k) {
    return GemmSide{a.view().data, in, along_k ? num_k : 1, along_k ? 1 : rows};
  };
  const GemmOut to = {out.view().data, out_dtype, out_along_v ? num_v : 1, out_along_v ? 1 : num_q, accumulate};
  const GemmProblem p = {side(q, num_q, q_along_k), side(v, num_v, v_along_k), to, num_q, num_v, num_k};
  const GemmPlan plan = plan_gemm(p, 0, Wide::tile_rows, 2 * Wide::width, false);
  std::vector<float> scratch(plan.scratch(), NAN);
  for (int64_t q0 = 0; q0 < num_q; q0 += plan.q_part) {
    const int64_t q1 = std::min(num_q, q0 + plan.q_part);
    gemm_tile<Wide, Single>({&p, &plan, q0, q1, 0, num_v, false}, scratch.data());
  }
  for (int64_t i = 0; i < num_q; ++i) {
    for (int64_t j = 0; j < num_v; ++j) {
      const int64_t at = out_along_v ? i * num_v + j : j * num_q + i;
      double total = accumulate ? start[at] : 0, magnitude = std::fabs(total);
      for (int64_t k = 0; k < num_k; ++k) {
        const double term = q[q_along_k ? i * num_k + k : k * num_q + i] * v[v_along_k ? j * num_k + k : k * num_v + j];
        total += term;
        magnitude += std::fabs(term);
      }
      const double tolerance = magnitude * (2 + 2 * std::sqrt(num_k)) * 6e-8 + out.rounding(total);
      ASSERT_NEAR(out[at], total, tolerance) << i << ", " << j << " of " << num_q << " x " << num_v << " x " << num_k;
    }
  }
}

TEST(Wide, GemmTile) {
  test::Rng rng(1);
  for (int trial = 0; trial < 96; ++trial) {
    const bool out_along_v = trial & 4;
    check_tile(test::pick(rng, {1, 5, 13, 14, 15, 29, 100}), test::pick(rng, {1, 8, 15, 16, 17, 31, 33, 70}),
               test::pick(rng, {1, 7, 8, 9, 255, 300, 1030}), trial & 1, trial & 2, out_along_v,
               trial & 8 ? DType::f32 : DType::bf16, trial & 16 ? DType::f32 : DType::bf16, rng() % 2, rng);
  }
}

TEST(Wide, SwigluAndUnpermute) {
  test::Rng rng(2);
  for (int64_t n : {1, 15, 16, 17, 63, 64, 65, 130}) {
    const Array x = Array(DType::f32, {1, 2 * n}).randomise(rng), y = Array(DType::f32, {2, n}).randomise(rng);
    const Array dout = Array(DType::f32, {1, n}).randomise(rng);
    Array out(DType::f32, {1, n}), dx(DType::f32, {1, 2 * n}), mixed(DType::f32, {1, n}), dy(DType::f32, {2, n});
    SwigluRows s = {DType::f32, n, 2 * n, n, x.view().data, dout.view().data, out.view().data, 1.0f, INFINITY, 0.0f};
    swiglu_rows<Wide>(s, 0, 1);
    s.out = dx.view().data;
    swiglu_bwd_rows<Wide>(s, 0, 1);
    const int32_t row_of[2] = {1, 0};
    const float probs[2] = {0.25f, -3.0f};
    float dprobs[2];
    UnpermuteRows u = {DType::f32,       n,       2, row_of, probs, y.view().data, mixed.view().data, dout.view().data,
                       dy.view().data, dprobs, false, true};
    unpermute_tokens<Wide>(u, 0, 1);
    unpermute_bwd_tokens<Wide>(u, 0, 1);
    double dots[2] = {0, 0};
    for (int64_t i = 0; i < n; ++i) {
      const double g = x[i], sigmoid = 1 / (1 + std::exp(-g));
      ASSERT_NEAR(out[i], g * sigmoid * x[n + i], 2e-6);
      ASSERT_NEAR(dx[i], dout[i] * x[n + i] * sigmoid * (1 + g * (1 - sigmoid)), 5e-6);
      ASSERT_NEAR(dx[n + i], dout[i] * g * sigmoid, 2e-6);
      ASSERT_NEAR(mixed[i], 0.25 * y[n + i] - 3.0 * y[i], 2e-6);
      ASSERT_NEAR(dy[n + i], 0.25 * dout[i], 1e-6);
      ASSERT_NEAR(dy[i], -3.0 * dout[i], 1e-6);
      dots[0] += dout[i] * y[n + i];
      dots[1] += dout[i] * y[i];
    }
    ASSERT_NEAR(dprobs[0], dots[0], 1e-4);
    ASSERT_NEAR(dprobs[1], dots[1], 1e-4);
  }
}

}  // namespace
}  // namespace xt::cpu
