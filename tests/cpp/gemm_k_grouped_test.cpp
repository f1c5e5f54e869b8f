#include "xtuner/ops/gemm_k_grouped.h"

#include "helpers.h"

namespace xt::test {
namespace {

void check(const std::vector<int64_t>& rows, int64_t m, int64_t n, int64_t tail, double beta, DType in, DType out_dtype,
           Rng& rng) {
  SCOPED_TRACE("M=" + std::to_string(m) + " N=" + std::to_string(n) + " beta=" + std::to_string(beta));
  const std::vector<int64_t> at = offsets_of(rows);
  const int64_t e_count = static_cast<int64_t>(rows.size()), used = at.back(), r = used + tail;
  const Array a = Array(in, {r, m}).randomise(rng, used * m), b = Array(in, {r, n}).randomise(rng, used * n);
  Array start(out_dtype, {e_count, m, n});
  if (beta != 0) start.randomise(rng);  // with beta 0 the output starts as NaN and must not be read
  const auto run = [&](int threads, Array& out) {
    gemm_k_grouped(a.view(), b.view(), view(at, {e_count + 1}), beta, out.view(), {nullptr, threads});
  };
  Array out = start;
  run(2, out);
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t e = i / (m * n), row = i / n % m, column = i % n;
    if (rows[e] == 0 && beta != 0) {
      ASSERT_EQ(out[i], start[i]) << "an expert without rows was touched";
      continue;
    }
    double sum = beta != 0 ? start[i] : 0.0, size = std::fabs(sum);
    for (int64_t k = at[e]; k < at[e + 1]; ++k) {
      const double term = a[k * m + row] * b[k * n + column];
      sum += term;
      size += std::fabs(term);
    }
    const double tolerance = size * (2 + 2 * std::sqrt(rows[e])) * 6e-8 + out.rounding(sum);
    ASSERT_NEAR(out[i], sum, tolerance) << "expert " << e << " [" << row << ", " << column << "]";
  }
  expect_same_bits(start, run);
}

TEST(GemmKGrouped, MatchesReferenceOnRandomLayouts) {
  Rng rng(1);
  for_each_isa([&] {
    for (int trial = 0; trial < 60; ++trial) {
      check(random_rows(rng, pick(rng, {1, 3, 8})), pick(rng, odd_sizes), pick(rng, odd_sizes), pick(rng, {0, 1, 19}),
            trial % 2, trial % 3 ? DType::f32 : DType::bf16, trial % 4 < 2 ? DType::f32 : DType::bf16, rng);
    }
  });
}

TEST(GemmKGrouped, MatchesReferenceWhereTilesAreCut) {
  Rng rng(2);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      check({700, 0, 1}, 290, 70, 5, 0, dtype, dtype, rng);
      check({257}, 70, 290, 0, 1, dtype, dtype, rng);
      check({20, 600}, 120, 300, 0, 1, DType::bf16, dtype, rng);
    }
  });
}

TEST(GemmKGrouped, EmptyShapes) {
  Rng rng(3);
  for (double beta : {0.0, 1.0}) {
    check({0, 0}, 16, 17, 0, beta, DType::f32, DType::f32, rng);
    check({0, 0}, 16, 17, 9, beta, DType::bf16, DType::bf16, rng);
    check({3, 2}, 0, 16, 4, beta, DType::f32, DType::f32, rng);
    check({3, 2}, 16, 0, 4, beta, DType::f32, DType::f32, rng);
    check({}, 16, 16, 4, beta, DType::f32, DType::f32, rng);
  }
}

TEST(GemmKGrouped, NamesBadArguments) {
  const Array a(DType::f32, {8, 4}), b(DType::f32, {8, 3}), short_b(DType::f32, {7, 3}), out(DType::f32, {2, 4, 3});
  std::vector<int64_t> at = {0, 3, 8};
  const auto call = [&](const Array& right, double beta) {
    return [&, beta] { gemm_k_grouped(a.view(), right.view(), view(at, {3}), beta, out.view(), {}); };
  };
  expect_error(call(b, 0.5), "gemm_k_grouped: beta must be 0 or 1, got 0.5");
  expect_error(call(short_b, 0), "b must be float32 [R=8, N], got float32 [7, 3] on cpu");
  at = {0, 5, 9};
  expect_error(call(b, 0), "gemm_k_grouped: offsets[2]=9 exceeds the 8 rows there are");
  expect_error([&] { gemm_k_grouped(a.view(), b.view(), view(at, {3}), 0, b.view(), {}); },
               "out must be float32 or bfloat16 [E=2, M=4, N=3], got float32 [8, 3] on cpu");
}

}  // namespace
}  // namespace xt::test
