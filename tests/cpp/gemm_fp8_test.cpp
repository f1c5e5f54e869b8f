// Both float8 products against float64 sums of the same codes and scales.
#include "helpers.h"
#include "xtuner/ops/gemm_k_grouped_fp8.h"
#include "xtuner/ops/gemm_m_grouped_fp8.h"
#include "xtuner/ops/quantize.h"

namespace xt::test {
namespace {

constexpr int64_t block = 128;

// Random numbers in the first `used` elements, NaN in the rest.
Array codes(DType format, Shape shape, int64_t used, Rng& rng) {
  Array x(format, std::move(shape));
  x.fill(std::nan(""));
  return x.randomise(rng, used);
}

Array positive(Shape shape, Rng& rng) {
  Array s(DType::f32, std::move(shape));
  for (int64_t i = 0; i < s.count(); ++i) {
    s.set(i, std::ldexp(1.0 + rng() % 1000 / 1000.0, static_cast<int>(rng() % 9) - 4));
  }
  return s;
}

void check_m(const std::vector<int64_t>& rows, int64_t n, int64_t k, int64_t tail, bool swapped_scales, DType in,
             DType out_dtype, Rng& rng) {
  SCOPED_TRACE("N=" + std::to_string(n) + " K=" + std::to_string(k) + " E=" + std::to_string(rows.size()));
  const std::vector<int64_t> at = offsets_of(rows);
  const int64_t experts = static_cast<int64_t>(rows.size()), used = at.back(), r = used + tail, ld = row_scale_ld(r);
  const Array a = codes(in, {r, k}, used * k, rng), b = codes(DType::e4m3, {experts, n, k}, -1, rng);
  Array scale_a = positive({k / block, ld}, rng);
  for (int64_t i = 0; i < scale_a.count(); ++i) {
    if (i % ld >= used) scale_a.set(i, std::nan(""));  // never read
  }
  const int64_t nb = n / block, kb = k / block;
  const Array scale_b = positive(swapped_scales ? Shape{experts, kb, nb} : Shape{experts, nb, kb}, rng);
  Tensor sb(scale_b.view().data, DType::f32, {experts, nb, kb});
  if (swapped_scales) {
    sb.strides[1] = 1;
    sb.strides[2] = nb;
  }
  const auto run = [&](int threads, Array& out) {
    gemm_m_grouped_fp8(a.view(), scale_a.view(), b.view(), sb, view(at, {experts + 1}), out.view(), {nullptr, threads});
  };
  Array out(out_dtype, {r, n});
  run(2, out);
  int64_t e = 0;
  for (int64_t i = 0; i < r; ++i) {
    while (e < experts && at[e + 1] <= i) ++e;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t l = 0; i < used && l < k; ++l) {
        const int64_t s = swapped_scales ? l / block * nb + j / block : j / block * kb + l / block;
        const double scale = scale_a[l / block * ld + i] * scale_b[e * nb * kb + s];
        const double term = a[i * k + l] * b[(e * n + j) * k + l] * scale;
        sum += term;
        size += std::fabs(term);
      }
      ASSERT_NEAR(out[i * n + j], sum, size * 2e-6 + out.rounding(sum)) << "row " << i << " column " << j;
    }
  }
  expect_same_bits(Array(out_dtype, {r, n}), run);
}

void check_k(const std::vector<int64_t>& rows, int64_t m, int64_t n, double beta, DType in, DType out_dtype, Rng& rng) {
  SCOPED_TRACE("M=" + std::to_string(m) + " N=" + std::to_string(n) + " beta=" + std::to_string(beta));
  const std::vector<int64_t> at = offsets_of(rows);
  const int64_t experts = static_cast<int64_t>(rows.size()), p = padded_rows(at.back(), experts);
  std::vector<int64_t> begin = {0};  // of each expert's columns
  for (int64_t count : rows) begin.push_back(begin.back() + (count + block - 1) / block * block);
  const auto operand = [&](DType format, int64_t lines) {
    Array x = codes(format, {lines, p}, -1, rng);
    for (int64_t i = 0; i < x.count(); ++i) {
      const int64_t col = i % p, e = std::upper_bound(begin.begin(), begin.end(), col) - begin.begin() - 1;
      if (e >= experts) {
        x.set(i, std::nan(""));  // never read
      } else if (col >= begin[e] + rows[e]) {
        x.set(i, 0);
      }
    }
    return x;
  };
  const Array a = operand(in, m), b = operand(DType::e4m3, n);
  const Array scale_a = positive({p / block, m}, rng), scale_b = positive({p / block, n}, rng);
  Array start(out_dtype, {experts, m, n});
  if (beta != 0) start.randomise(rng);
  const auto run = [&](int threads, Array& out) {
    gemm_k_grouped_fp8(a.view(), scale_a.view(), b.view(), scale_b.view(), view(at, {experts + 1}), beta, out.view(),
                       {nullptr, threads});
  };
  Array out = start;
  run(2, out);
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t e = i / (m * n), row = i / n % m, column = i % n;
    double sum = beta != 0 ? start[i] : 0.0, size = std::fabs(sum);
    for (int64_t t = begin[e]; t < begin[e] + rows[e]; ++t) {
      const double scale = scale_a[t / block * m + row] * scale_b[t / block * n + column];
      const double term = a[row * p + t] * b[column * p + t] * scale;
      sum += term;
      size += std::fabs(term);
    }
    ASSERT_NEAR(out[i], sum, size * 2e-6 + out.rounding(sum)) << "expert " << e << " [" << row << ", " << column << "]";
    if (rows[e] == 0) {
      ASSERT_EQ(out[i], beta != 0 ? start[i] : 0.0);
    }
  }
  expect_same_bits(start, run);
}

TEST(GemmFp8, MatchReferenceOnRandomLayouts) {
  Rng rng(1);
  for_each_isa([&] {
    for (int trial = 0; trial < 8; ++trial) {
      const DType in = trial % 2 ? DType::e4m3 : DType::e5m2, out = trial % 3 ? DType::f32 : DType::bf16;
      const std::vector<int64_t> rows = random_rows(rng, pick(rng, {1, 3}));
      check_m(rows, pick(rng, {0, 128, 256}), pick(rng, {0, 128, 384}), pick(rng, {0, 1, 19}), trial % 2, in, out, rng);
      check_k(rows, pick(rng, {0, 128, 256}), 128, trial % 2, in, out, rng);
    }
    check_m({}, 128, 128, 3, false, DType::e4m3, DType::f32, rng);
    check_k({}, 128, 128, 0, DType::e4m3, DType::f32, rng);
  });
}

TEST(GemmFp8, NamesBadArguments) {
  const Array a(DType::e4m3, {4, 128}), b(DType::e4m3, {1, 128, 128}), s(DType::f32, {1, 4}), sb(DType::f32, {1, 1, 1});
  const Array odd(DType::e4m3, {1, 64, 128}), out(DType::f32, {4, 128}), bf16(DType::bf16, {4, 128});
  const std::vector<int64_t> at = {0, 4};
  const auto call = [&](const Array& left, const Array& right, const Array& s_left) {
    return [&] {
      gemm_m_grouped_fp8(left.view(), s_left.view(), right.view(), sb.view(), view(at, {2}), out.view(), {});
    };
  };
  expect_error(call(bf16, b, s), "gemm_m_grouped_fp8: a must be float8_e4m3fn or float8_e5m2 [R, K], got bfloat16");
  expect_error(call(a, odd, s), "gemm_m_grouped_fp8: N must be a multiple of 128 for float8");
  expect_error(call(a, b, sb), "scale_a must be float32 [K/128=1, ld], got float32 [1, 1, 1] on cpu");
  const Array at_k(DType::e4m3, {128, 128}), sk(DType::f32, {1, 128}), dw(DType::f32, {2, 128, 128});
  std::vector<int64_t> two = {0, 1, 2};
  const Tensor x = at_k.view(), sx = sk.view();
  expect_error([&] { gemm_k_grouped_fp8(x, sx, x, sx, view(two, {3}), 0, dw.view(), {}); },
               "the padded rows of expert 1 end at 256, past the P=128 columns there are");
}

}  // namespace
}  // namespace xt::test
