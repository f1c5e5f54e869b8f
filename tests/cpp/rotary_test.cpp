#include "xtuner/ops/rotary.h"

#include "helpers.h"

namespace xt::test {
namespace {

void check(DType dtype, int64_t tokens, int64_t heads, int64_t half, Rng& rng) {
  const Array x = Array(dtype, {tokens, heads, 2 * half}).randomise(rng);
  const Array cos = Array(dtype, {tokens, half}).randomise(rng), sin = Array(dtype, {tokens, half}).randomise(rng);
  for (bool back : {false, true}) {
    Array out(dtype, {tokens, heads, 2 * half});
    rotary(x.view(), cos.view(), sin.view(), back, out.view(), {});
    for (int64_t i = 0; i < tokens * heads * half; ++i) {
      const int64_t first = i / half * 2 * half + i % half, second = first + half;
      const int64_t table = i / half / heads * half + i % half;
      const double c = cos[table], s = back ? -sin[table] : sin[table];
      const double a = x[first] * c - x[second] * s, b = x[second] * c + x[first] * s;
      const double slack = 3e-7 * (std::fabs(x[first]) + std::fabs(x[second])) * (std::fabs(c) + std::fabs(s));
      ASSERT_NEAR(out[first], a, out.rounding(a) + slack) << "element " << first;
      ASSERT_NEAR(out[second], b, out.rounding(b) + slack) << "element " << second;
    }
    expect_same_bits(Array(dtype, {tokens, heads, 2 * half}), [&](int threads, Array& again) {
      rotary(x.view(), cos.view(), sin.view(), back, again.view(), {nullptr, threads});
    });
  }
}

TEST(Rotary, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t half : odd_sizes) check(dtype, pick(rng, {1, 2, 7}), pick(rng, {1, 3}), half, rng);
      for (int64_t tokens : {0, 1, 8, 128, 129, 768}) check(dtype, tokens, 2, pick(rng, {8, 20}), rng);
      check(dtype, 3, 0, 4, rng);
      check(dtype, 3, 2, 0, rng);
    }
  });
}

TEST(Rotary, NamesBadArguments) {
  const Array x(DType::f32, {2, 1, 5}), even(DType::f32, {2, 1, 6}), table(DType::f32, {2, 3}), wide(DType::f32, {2, 6});
  expect_error([&] { rotary(x.view(), table.view(), table.view(), false, x.view(), {}); },
               "rotary: x must have an even number of features per head, got 5");
  expect_error([&] { rotary(even.view(), table.view(), wide.view(), false, even.view(), {}); },
               "rotary: sin must be float32 [T=2, D/2=3], got float32 [2, 6] on cpu");
}

}  // namespace
}  // namespace xt::test
