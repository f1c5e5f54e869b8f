// Both grouped products over every size, load and data type, with NaN in all rows past the last expert's.
#include "helpers.h"
#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::test {
namespace {

struct Sum {
  double value = 0, size = 0;
  int64_t terms = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
    ++terms;
  }
};

// All outputs of a small product; of a large one some, its first and last among them.
void expect_sums(const Array& out, int64_t terms, Rng& rng, const std::function<Sum(int64_t)>& wanted) {
  const int64_t n = out.count(), most = std::max<int64_t>(200, 200000 / std::max<int64_t>(terms, 1));
  for (int64_t j = 0; j < std::min(n, most); ++j) {
    const int64_t i = n <= most ? j : j == 0 ? 0 : j == 1 ? n - 1 : static_cast<int64_t>(rng() % n);
    const Sum s = wanted(i);
    ASSERT_NEAR(out[i], s.value, s.size * (2 + 2 * std::sqrt(s.terms)) * 6e-8 + out.rounding(s.value)) << "at " << i;
  }
}

TEST(GemmFuzz, MGrouped) {
  Rng rng(1);
  for_each_isa([&] {
    fuzz(3, rng, [&](const FuzzCase& c) {
      const int64_t n = c.sizes[1], kd = c.sizes[2];
      const int64_t e_count = n * kd > 20000 ? pick(rng, {1, 2, 3}) : pick(rng, {1, 8, 129});
      const std::vector<int64_t> at = offsets_of(rows_of_load(rng, c.load, e_count, c.sizes[0]));
      const int64_t used = at.back(), r = used + pick(rng, {0, 1, 129});
      const bool trans_b = rng() % 2;
      const DType out_dtype = rng() % 2 ? c.dtype : DType::f32;
      const Array a = Array(c.dtype, {r, kd}).randomise(rng, used * kd);
      const Array b = Array(c.dtype, {e_count, trans_b ? n : kd, trans_b ? kd : n}).randomise(rng);
      const auto run = [&](int threads, Array& out) {
        gemm_m_grouped(a.view(), b.view(), view(at, {e_count + 1}), trans_b, out.view(), {nullptr, threads});
      };
      Array out(out_dtype, {r, n});
      run(2, out);
      expect_sums(out, kd, rng, [&](int64_t i) {
        const int64_t row = i / n, column = i % n;
        const int64_t e = std::upper_bound(at.begin(), at.end(), row) - at.begin() - 1;
        Sum s;
        for (int64_t k = 0; row < used && k < kd; ++k) {
          s.add(a[row * kd + k] * b[e * n * kd + (trans_b ? column * kd + k : k * n + column)]);
        }
        return s;
      });
      expect_same_bits(Array(out_dtype, {r, n}), run);
    });
  });
}

TEST(GemmFuzz, KGrouped) {
  Rng rng(2);
  for_each_isa([&] {
    fuzz(3, rng, [&](const FuzzCase& c) {
      const int64_t m = c.sizes[1], n = c.sizes[2], e_count = pick(rng, {1, 2, 8});
      const std::vector<int64_t> at = offsets_of(rows_of_load(rng, c.load, e_count, c.sizes[0]));
      const int64_t used = at.back(), r = used + pick(rng, {0, 1, 129});
      const double beta = rng() % 2;
      const DType out_dtype = rng() % 2 ? c.dtype : DType::f32;
      const Array a = Array(c.dtype, {r, m}).randomise(rng, used * m);
      const Array b = Array(c.dtype, {r, n}).randomise(rng, used * n);
      Array start(out_dtype, {e_count, m, n});  // with beta 0 it is NaN and must not be read
      if (beta != 0) start.randomise(rng);
      const auto run = [&](int threads, Array& out) {
        gemm_k_grouped(a.view(), b.view(), view(at, {e_count + 1}), beta, out.view(), {nullptr, threads});
      };
      Array out = start;
      run(2, out);
      expect_sums(out, used / e_count, rng, [&](int64_t i) {
        const int64_t e = i / (m * n), row = i / n % m, column = i % n;
        Sum s;
        if (beta != 0) s.add(start[i]);
        for (int64_t k = at[e]; k < at[e + 1]; ++k) s.add(a[k * m + row] * b[k * n + column]);
        return s;
      });
      expect_same_bits(start, run);
    });
  });
}

}  // namespace
}  // namespace xt::test
