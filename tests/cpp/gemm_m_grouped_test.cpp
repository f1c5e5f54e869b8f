#include "xtuner/ops/gemm_m_grouped.h"

#include "helpers.h"

namespace xt::test {
namespace {

struct Case {
  std::vector<int64_t> rows;  // of each expert
  int64_t n, k, tail;
  bool trans_b;
  DType in, out;
};

std::string name(const Case& c) {
  std::string s = "rows";
  for (int64_t r : c.rows) s += " " + std::to_string(r);
  return s + " N=" + std::to_string(c.n) + " Kd=" + std::to_string(c.k) + (c.trans_b ? " NT" : " NN") +
         (c.in == DType::bf16 ? " bf16" : " f32") + (c.out == DType::bf16 ? "->bf16" : "->f32");
}

// The error of a sum of k products in fp32, then one rounding to the output's dtype.
void check(const Case& c, Rng& rng) {
  SCOPED_TRACE(name(c));
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t e_count = static_cast<int64_t>(c.rows.size()), used = at.back(), r = used + c.tail;
  const Array a = Array(c.in, {r, c.k}).randomise(rng, used * c.k);  // rows past `used` are NaN
  const Array b = Array(c.in, {e_count, c.trans_b ? c.n : c.k, c.trans_b ? c.k : c.n}).randomise(rng);
  const auto run = [&](int threads, Array& out) {
    gemm_m_grouped(a.view(), b.view(), view(at, {e_count + 1}), c.trans_b, out.view(), {nullptr, threads});
  };
  Array out(c.out, {r, c.n});
  run(2, out);
  int64_t e = 0;
  for (int64_t i = 0; i < r; ++i) {
    while (e < e_count && at[e + 1] <= i) ++e;
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0, size = 0;
      for (int64_t k = 0; i < used && k < c.k; ++k) {
        const double term = a[i * c.k + k] * b[e * c.n * c.k + (c.trans_b ? j * c.k + k : k * c.n + j)];
        sum += term;
        size += std::fabs(term);
      }
      const double tolerance = size * (2 + 2 * std::sqrt(c.k)) * 6e-8 + out.rounding(sum);
      ASSERT_NEAR(out[i * c.n + j], sum, tolerance) << "row " << i << " column " << j;
    }
  }
  expect_same_bits(Array(c.out, {r, c.n}), run);
}

TEST(GemmMGrouped, MatchesReferenceOnRandomLayouts) {
  Rng rng(1);
  for_each_isa([&] {
    for (int trial = 0; trial < 60; ++trial) {
      check({random_rows(rng, pick(rng, {1, 3, 8})), pick(rng, odd_sizes), pick(rng, odd_sizes), pick(rng, {0, 1, 19}),
             trial % 2 == 0, trial % 3 ? DType::f32 : DType::bf16, trial % 4 < 2 ? DType::f32 : DType::bf16},
            rng);
    }
  });
}

// More than one block of k, more than one part of rows and columns, and k too long for one pass over V.
TEST(GemmMGrouped, MatchesReferenceWhereTilesAreCut) {
  Rng rng(2);
  for_each_isa([&] {
    for (bool trans_b : {true, false}) {
      check({{300, 0, 7}, 270, 600, 5, trans_b, DType::f32, DType::f32}, rng);
      check({{7, 290, 0}, 70, 1300, 0, trans_b, DType::bf16, DType::bf16}, rng);
      check({{110}, 300, 513, 2, trans_b, DType::bf16, DType::f32}, rng);
      check({{5, 1}, 400, 520, 0, trans_b, DType::f32, DType::bf16}, rng);
    }
  });
}

TEST(GemmMGrouped, EmptyShapes) {
  Rng rng(3);
  for (bool trans_b : {true, false}) {
    check({{0, 0}, 16, 16, 0, trans_b, DType::f32, DType::f32}, rng);   // R = 0
    check({{0, 0}, 16, 16, 9, trans_b, DType::f32, DType::f32}, rng);   // nothing but tail
    check({{3, 2}, 16, 0, 4, trans_b, DType::bf16, DType::bf16}, rng);  // an empty sum is zero
    check({{3, 2}, 0, 16, 4, trans_b, DType::f32, DType::f32}, rng);
    check({{}, 16, 16, 4, trans_b, DType::f32, DType::f32}, rng);       // no experts
  }
}

// A row's result does not depend on which and how many other rows share its expert.
TEST(GemmMGrouped, RowsDoNotInfluenceEachOther) {
  Rng rng(4);
  const int64_t r = 400, n = 96, k = 300;
  const Array a = Array(DType::f32, {r, k}).randomise(rng), b = Array(DType::f32, {1, n, k}).randomise(rng);
  for_each_isa([&] {
    for (bool trans_b : {true, false}) {
      const Tensor w(b.view().data, DType::f32, {1, trans_b ? n : k, trans_b ? k : n});
      const auto first_rows = [&](int64_t count) {
        Array out(DType::f32, {count, n});
        const std::vector<int64_t> at = {0, count};
        gemm_m_grouped(Tensor(a.view().data, DType::f32, {count, k}), w, view(at, {2}), trans_b, out.view(), {});
        auto bytes = out.bytes();
        bytes.resize(static_cast<size_t>(n) * 4);
        return bytes;
      };
      const auto all = first_rows(r);
      for (int64_t count : {1, 6, 50, 120}) EXPECT_EQ(first_rows(count), all) << count << " rows";
    }
  });
}

TEST(GemmMGrouped, NamesBadArguments) {
  const Array a(DType::f32, {8, 4}), b(DType::f32, {2, 3, 4}), out(DType::f32, {8, 3}), bf(DType::bf16, {2, 3, 4});
  std::vector<int64_t> at = {0, 3, 8};
  const auto call = [&](const Tensor& w, bool trans_b) {
    return [&, w, trans_b] { gemm_m_grouped(a.view(), w, view(at, {3}), trans_b, out.view(), {}); };
  };
  expect_error(call(b.view(), false), "gemm_m_grouped: b must be float32 [E=2, Kd=4, N], got float32 [2, 3, 4] on cpu");
  expect_error(call(bf.view(), true), "b must be float32 [E=2, N, Kd=4], got bfloat16 [2, 3, 4] on cpu");
  at = {0, 5, 4};
  expect_error(call(b.view(), true), "offsets must not decrease, but offsets[1]=5 > offsets[2]=4");
  at = {0, 5, 9};
  expect_error(call(b.view(), true), "offsets[2]=9 exceeds the 8 rows there are");
  at = {1, 5, 8};
  expect_error(call(b.view(), true), "offsets[0] must be 0, got 1");
}

}  // namespace
}  // namespace xt::test
