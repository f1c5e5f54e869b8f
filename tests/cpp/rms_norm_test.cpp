#include "xtuner/ops/rms_norm.h"

#include "helpers.h"

namespace xt::test {
namespace {

constexpr double eps = 1e-3;

double rounded(const Array& like, double v) {
  return like.view().dtype == DType::bf16 ? widen(narrow(static_cast<float>(v))) : v;
}

void check(DType dtype, int64_t rows, int64_t width, Rng& rng) {
  SCOPED_TRACE("rows " + std::to_string(rows) + ", width " + std::to_string(width));
  const Array x = Array(dtype, {rows, width}).randomise(rng), dout = Array(dtype, {rows, width}).randomise(rng);
  const Array weight = Array(dtype, {width}).randomise(rng);
  Array out(dtype, {rows, width}), inverse(DType::f32, {rows}), dx(dtype, {rows, width}), dweight(dtype, {width});
  const Array space(DType::f32, {(rows + rms_norm_block_rows - 1) / rms_norm_block_rows, width});
  rms_norm(x.view(), weight.view(), eps, out.view(), inverse.view(), {});
  const auto backward = [&](int threads, Array& dx_out, Array& dweight_out) {
    rms_norm_bwd(dout.view(), x.view(), weight.view(), inverse.view(), dx_out.view(), dweight_out.view(), space.view(),
                 {nullptr, threads});
  };
  backward(1, dx, dweight);

  // Sums of `n` terms are off by at most n roundings of what their terms add up to without their signs.
  const double unit = std::ldexp(1.0, -23);
  std::vector<double> wanted_dweight(width), sizes(width);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, along = 0, along_size = 0;
    for (int64_t i = 0; i < width; ++i) squares += x[r * width + i] * x[r * width + i];
    const double inv = 1 / std::sqrt(squares / width + eps);
    ASSERT_NEAR(inverse[r], inv, inv * unit * (width + 4));
    for (int64_t i = 0; i < width; ++i) {
      const double term = dout[r * width + i] * weight[i] * x[r * width + i] * inv;
      along += term / width;
      along_size += std::fabs(term) / width;
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = r * width + i;
      const double u = x[at] * inv, y = rounded(x, u) * weight[i], slack = unit * (2 * width + 8);
      // u near a rounding boundary of bfloat16 may fall to either side
      ASSERT_NEAR(out[at], y, out.rounding(y) + std::fabs(weight[i]) * x.rounding(u) + slack * std::fabs(y));
      const double dx_wanted = inv * (dout[at] * weight[i] - u * along);
      const double size = inv * (std::fabs(dout[at] * weight[i]) + std::fabs(u) * along_size);
      ASSERT_NEAR(dx[at], dx_wanted, dx.rounding(dx_wanted) + slack * size);
      wanted_dweight[i] += dout[at] * u;
      sizes[i] += std::fabs(dout[at] * u);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    ASSERT_NEAR(dweight[i], wanted_dweight[i],
                dweight.rounding(wanted_dweight[i]) + unit * (rows + width + 8) * sizes[i]);
  }
  expect_same_bits(Array(dtype, {rows, width}), [&](int threads, Array& again) {
    rms_norm(x.view(), weight.view(), eps, again.view(), inverse.view(), {nullptr, threads});
  });
  expect_same_bits(Array(dtype, {rows, width}), [&](int threads, Array& again) {
    Array other(dtype, {width});
    backward(threads, again, other);
  });
  expect_same_bits(Array(dtype, {width}), [&](int threads, Array& again) {
    Array other(dtype, {rows, width});
    backward(threads, other, again);
  });
}

TEST(RmsNorm, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t width : odd_sizes) check(dtype, pick(rng, {1, 2, 7, 8, 40}), width, rng);
      for (int64_t rows : {0, 1, 127, 128, 129, 300, 768}) check(dtype, rows, pick(rng, {1, 16, 33}), rng);
    }
  });
}

TEST(RmsNorm, RowOfZeros) {
  for_each_isa([&] {
    const std::vector<float> x(8), weight(8, 1.0f), dout(8, 1.0f);
    std::vector<float> out(8, NAN), inverse(1), dx(8, NAN), dweight(8, NAN), space(8, NAN);
    rms_norm(view(x, {1, 8}), view(weight, {8}), 1e-6, view(out, {1, 8}), view(inverse, {1}), {});
    rms_norm_bwd(view(dout, {1, 8}), view(x, {1, 8}), view(weight, {8}), view(inverse, {1}), view(dx, {1, 8}),
                 view(dweight, {8}), view(space, {1, 8}), {});
    for (int i = 0; i < 8; ++i) {
      EXPECT_EQ(out[i], 0.0f);
      EXPECT_NEAR(dx[i], 1000.0f, 1e-3f);
      EXPECT_EQ(dweight[i], 0.0f);
    }
  });
}

TEST(RmsNorm, NamesBadArguments) {
  const Array x(DType::f32, {2, 6}), weight(DType::f32, {6}), wide(DType::f32, {7}), bf(DType::bf16, {6}),
      inverse(DType::f32, {2}), space(DType::f32, {2, 6});
  expect_error([&] { rms_norm(x.view(), wide.view(), 0, x.view(), inverse.view(), {}); },
               "rms_norm: weight must be float32 [D=6], got float32 [7] on cpu");
  expect_error([&] { rms_norm(x.view(), bf.view(), 0, x.view(), inverse.view(), {}); },
               "rms_norm: weight must be float32 [D=6], got bfloat16 [6] on cpu");
  const Array none(DType::f32, {2, 0}), no_weight(DType::f32, {0});
  expect_error([&] { rms_norm(none.view(), no_weight.view(), 0, none.view(), inverse.view(), {}); },
               "rms_norm: x must have at least one column, got none");
  expect_error([&] { rms_norm(x.view(), weight.view(), -1, x.view(), inverse.view(), {}); },
               "rms_norm: eps must not be negative, got -1");
  expect_error(
      [&] {
        rms_norm_bwd(x.view(), x.view(), weight.view(), inverse.view(), x.view(), weight.view(), space.view(), {});
      },
      "rms_norm_bwd: workspace must be float32 [R/128=1, D=6], got float32 [2, 6] on cpu");
}

}  // namespace
}  // namespace xt::test
