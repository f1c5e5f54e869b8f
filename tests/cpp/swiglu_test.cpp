#include "xtuner/ops/swiglu.h"

#include "helpers.h"

namespace xt::test {
namespace {

struct Wanted {
  double out, dgate, dup;
};

double clamp(double v, double low, double high) { return v > high ? high : v < low ? low : v; }

Wanted reference(double gate, double up, double dout, const SwigluParams& p) {
  const double limit = p.limit.value_or(INFINITY);
  const double g = std::fmin(gate, limit), u = clamp(up, -limit, limit) + p.up_offset;
  const double s = 1 / (1 + std::exp(-p.alpha * g));
  const double slope = s + p.alpha * g * s * (1 - s);
  return {g * s * u, gate > limit ? 0 : dout * u * slope, std::fabs(up) > limit ? 0 : dout * g * s};
}

const std::vector<SwigluParams> all_params = {{}, {1.702, 7.0, 1.0}, {1.0, 0.5, 0.0}, {0.7, std::nullopt, -0.25}};

void check(DType dtype, int64_t used, int64_t tail, int64_t width, const SwigluParams& p, bool with_offsets, Rng& rng) {
  const int64_t r = used + (with_offsets ? tail : 0);
  const Array x = Array(dtype, {r, 2 * width}).randomise(rng, used * 2 * width);  // the tail is NaN
  const Array dout = Array(dtype, {r, width}).randomise(rng, used * width);
  const std::vector<int64_t> at = {0, used / 2, used};
  const Tensor offsets = view(at, {3});
  const Tensor* given = with_offsets ? &offsets : nullptr;
  const auto forward = [&](int threads, Array& out) { swiglu(x.view(), given, p, out.view(), {nullptr, threads}); };
  const auto backward = [&](int threads, Array& dx) {
    swiglu_bwd(dout.view(), x.view(), given, p, dx.view(), {nullptr, threads});
  };
  Array out(dtype, {r, width}), dx(dtype, {r, 2 * width});
  forward(1, out);
  backward(1, dx);
  for (int64_t row = 0; row < r; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t gate = row * 2 * width + i, up = gate + width, at_out = row * width + i;
      const Wanted w = row < used ? reference(x[gate], x[up], dout[at_out], p) : Wanted{0, 0, 0};
      ASSERT_NEAR(out[at_out], w.out, 1e-6 * (std::fabs(w.out) + 0.1) + out.rounding(w.out)) << "row " << row;
      ASSERT_NEAR(dx[gate], w.dgate, 2e-6 * (std::fabs(w.dgate) + 0.1) + dx.rounding(w.dgate)) << "row " << row;
      ASSERT_NEAR(dx[up], w.dup, 1e-6 * (std::fabs(w.dup) + 0.1) + dx.rounding(w.dup)) << "row " << row;
    }
  }
  expect_same_bits(Array(dtype, {r, width}), forward);
  expect_same_bits(Array(dtype, {r, 2 * width}), backward);
}

TEST(Swiglu, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (const SwigluParams& p : all_params) {
        for (int64_t width : odd_sizes) {
          check(dtype, pick(rng, {0, 1, 7, 90}), pick(rng, {0, 1, 12}), width, p, rng() % 2, rng);
        }
      }
      check(dtype, 0, 5, 16, {}, true, rng);
      check(dtype, 4, 2, 0, {}, true, rng);
    }
  });
}

TEST(Swiglu, Fuzz) {
  Rng rng(4);
  for_each_isa([&] {
    fuzz(2, rng, [&](const FuzzCase& c) {
      const int64_t used = c.load == Load::empty ? 0 : c.sizes[0];
      check(c.dtype, used, pick(rng, {0, 1, 129}), c.sizes[1], all_params[rng() % all_params.size()], rng() % 2, rng);
    });
  });
}

// Accuracy of the vector exp: g * sigmoid(g) over a dense grid, relative to the exact value.
TEST(Swiglu, SigmoidIsAccurate) {
  const int64_t n = 200000;
  std::vector<float> x(2 * n, 1.0f), out(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(-80.0 + 160.0 * i / n);
  for_each_isa([&] {
    swiglu(view(x, {1, 2 * n}), nullptr, {}, view(out, {1, n}), {nullptr, 2});
    double worst = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double g = x[i], exact = g / (1 + std::exp(-g));
      if (exact != 0) worst = std::fmax(worst, std::fabs(out[i] - exact) / std::fabs(exact));
    }
    EXPECT_LT(worst, 3.5e-7);  // exp 2e-7 at most, then an addition, a division and a product
  });
}

TEST(Swiglu, ExtremesAndNaN) {
  const float inf = INFINITY;
  const std::vector<float> x = {NAN, 1, 1000, -1000, 3e38f, 0, 1, NAN, 2, 3, 1, -inf};
  const int64_t n = 6;
  for_each_isa([&] {
    std::vector<float> out(n);
    swiglu(view(x, {1, 2 * n}), nullptr, {}, view(out, {1, n}), {});
    EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[1]));
    EXPECT_EQ(out[2], 2000.0f);
    EXPECT_EQ(out[3], 0.0f);
    EXPECT_EQ(out[4], 3e38f);
    swiglu(view(x, {1, 2 * n}), nullptr, {1.0, 7.0, 0.0}, view(out, {1, n}), {});
    EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[1])) << "a limit must not hide a NaN";
    EXPECT_EQ(out[3], 0.0f);
  });
}

TEST(Swiglu, NamesBadArguments) {
  const Array x(DType::f32, {2, 5}), even(DType::f32, {2, 6}), out(DType::f32, {2, 3}), bf(DType::bf16, {2, 3});
  expect_error([&] { swiglu(x.view(), nullptr, {}, out.view(), {}); }, "swiglu: x must have an even number of columns");
  expect_error([&] { swiglu(even.view(), nullptr, {}, bf.view(), {}); },
               "swiglu: out must be float32 [R=2, I=3], got bfloat16 [2, 3] on cpu");
  expect_error([&] { swiglu(even.view(), nullptr, {1, 0.0, 0}, out.view(), {}); }, "limit must be positive, got 0");
  expect_error([&] { swiglu_bwd(bf.view(), even.view(), nullptr, {}, even.view(), {}); },
               "swiglu_bwd: dout must be float32 [R=2, I=3], got bfloat16 [2, 3] on cpu");
}

}  // namespace
}  // namespace xt::test
