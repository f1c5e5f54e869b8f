// Grouped products with gathered rows, bias and SwiGLU: the same bits as the separate steps.
#include "helpers.h"
#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::test {
namespace {

struct Layout {
  std::vector<int64_t> at;   // offsets
  std::vector<int32_t> src;  // of each row; some are -1, some rows are not used
  int64_t tokens, per_token;
};

Layout random_layout(Rng& rng) {
  Layout l;
  l.at = offsets_of(random_rows(rng, pick(rng, {1, 3, 8})));
  l.tokens = 1 + static_cast<int64_t>(rng() % 40);
  l.per_token = pick(rng, {1, 2, 8});
  l.src.resize(l.at.back() + pick(rng, {0, 1, 9}));
  for (int32_t& s : l.src) s = rng() % 7 ? static_cast<int32_t>(rng() % (l.tokens * l.per_token)) : -1;
  return l;
}

void check(DType dtype, int64_t n, int64_t k, bool trans_b, bool gathers, Rng& rng) {
  const Layout l = random_layout(rng);
  const int64_t experts = static_cast<int64_t>(l.at.size()) - 1, rows = static_cast<int64_t>(l.src.size());
  SCOPED_TRACE("N=" + std::to_string(n) + " K=" + std::to_string(k) + " rows=" + std::to_string(rows));
  const Array x = Array(dtype, {l.tokens, k}).randomise(rng), bias = Array(dtype, {experts, n}).randomise(rng);
  const Array b = Array(dtype, {experts, trans_b ? n : k, trans_b ? k : n}).randomise(rng);
  const Tensor offsets = view(l.at, {experts + 1}), src = view(l.src, {rows});
  Array grouped(dtype, {rows, k});
  for (int64_t i = 0; i < rows * k; ++i) {
    const int32_t choice = l.src[i / k];
    grouped.set(i, choice < 0 ? 0 : x[choice / l.per_token * k + i % k]);
  }

  Array out(dtype, {rows, n}), act(dtype, {rows, n / 2}), separate(dtype, {rows, n}), separate_act(dtype, {rows, n / 2});
  const SwigluParams swiglu_params = {1.702, rng() % 2 ? std::optional<double>(1.0) : std::nullopt, 0.5};
  GemmMGroupedOptions options;
  const Tensor bias_view = bias.view();
  if (rng() % 2) options.bias = &bias_view;
  gemm_m_grouped(grouped.view(), b.view(), offsets, trans_b, separate.view(), {nullptr, 2}, options);
  swiglu(separate.view(), &offsets, swiglu_params, separate_act.view(), {nullptr, 2});

  const Tensor act_view = act.view();
  options.act = &act_view;
  options.swiglu = swiglu_params;
  if (gathers) options.gather = {&src, l.per_token};
  gemm_m_grouped((gathers ? x : grouped).view(), b.view(), offsets, trans_b, out.view(), {nullptr, 2}, options);
  EXPECT_EQ(out.bytes(), separate.bytes());
  EXPECT_EQ(act.bytes(), separate_act.bytes());
  expect_same_bits(Array(dtype, {rows, n}), [&](int threads, Array& again) {
    gemm_m_grouped((gathers ? x : grouped).view(), b.view(), offsets, trans_b, again.view(), {nullptr, threads}, options);
  });

  Array dw(dtype, {experts, n, k}), dw_separate(dtype, {experts, n, k});
  gemm_k_grouped(separate.view(), grouped.view(), offsets, 0, dw_separate.view(), {nullptr, 2});
  gemm_k_grouped(separate.view(), x.view(), offsets, 0, dw.view(), {nullptr, 2}, {&src, l.per_token});
  EXPECT_EQ(dw.bytes(), dw_separate.bytes());
}

TEST(GemmOptions, BitsOfTheSeparateSteps) {
  Rng rng(11);
  for_each_isa([&] {
    for (int trial = 0; trial < 24; ++trial) {
      check(trial & 1 ? DType::bf16 : DType::f32, pick(rng, {2, 6, 34, 70, 150}), pick(rng, {1, 8, 33, 300}), trial & 2,
            trial & 4, rng);
    }
    check(DType::f32, 600, 40, true, true, rng);  // more than one part of the columns
    check(DType::bf16, 600, 40, false, false, rng);
  });
}

void check_accumulate(DType dtype, int64_t n, int64_t k, bool trans_b, Rng& rng) {
  const int64_t rows = 200, tail = 3;
  const Array a = Array(dtype, {rows + tail, k}).randomise(rng, rows * k);  // rows past the last expert are NaN
  const Array b = trans_b ? Array(dtype, {3, n, k}).randomise(rng) : Array(dtype, {3, k, n}).randomise(rng);
  const Array before = Array(dtype, {rows + tail, n}).randomise(rng);
  const std::vector<int64_t> at = {0, 30, 30, rows};
  GemmMGroupedOptions options;
  Array product(dtype, {rows + tail, n}), out = before;
  gemm_m_grouped(a.view(), b.view(), view(at, {4}), trans_b, product.view(), {nullptr, 2});
  options.accumulate = true;
  const auto run = [&](int threads, Array& to) {
    to = before;
    gemm_m_grouped(a.view(), b.view(), view(at, {4}), trans_b, to.view(), {nullptr, threads}, options);
  };
  run(2, out);
  for (int64_t i = 0; i < (rows + tail) * n; ++i) {
    const double sum = before[i] + product[i];
    if (i >= rows * n) {
      ASSERT_EQ(out[i], before[i]) << "element " << i;
    } else {  // the sums of blocks of k are added to `before` one by one
      const double size = std::fabs(before[i]) + std::sqrt(static_cast<double>(k)) + std::fabs(product[i]);
      ASSERT_NEAR(out[i], sum, 1e-6 * size + out.rounding(sum) + product.rounding(product[i])) << "element " << i;
    }
  }
  expect_same_bits(Array(dtype, {rows + tail, n}), run);
}

TEST(GemmOptions, AddsToTheOutput) {
  Rng rng(13);
  for_each_isa([&] {
    for (int trial = 0; trial < 12; ++trial) {
      check_accumulate(trial % 3 ? DType::f32 : DType::bf16, pick(rng, {1, 7, 33, 150}), pick(rng, {0, 1, 8, 300, 600}),
                       trial % 2 == 0, rng);
    }
  });
}

TEST(GemmOptions, AddsNeitherBiasNorActivation) {
  Array x(DType::f32, {2, 4}), w(DType::f32, {1, 4, 4}), out(DType::f32, {2, 4}), bias(DType::f32, {1, 4});
  const std::vector<int64_t> at = {0, 2};
  const Tensor bias_view = bias.view();
  GemmMGroupedOptions options;
  options.bias = &bias_view;
  options.accumulate = true;
  EXPECT_THROW(gemm_m_grouped(x.view(), w.view(), view(at, {2}), true, out.view(), {nullptr, 1}, options), Error);
}

void check_bias(DType dtype, int64_t n, Rng& rng) {
  const int64_t rows = 200, k = 64;
  const Array a = Array(dtype, {rows, k}).randomise(rng), b = Array(dtype, {2, n, k}).randomise(rng);
  const Array bias = Array(dtype, {2, n}).randomise(rng);
  const std::vector<int64_t> at = {0, 30, rows};
  const Tensor bias_view = bias.view();
  GemmMGroupedOptions options;
  options.bias = &bias_view;
  Array out(dtype, {rows, n});
  gemm_m_grouped(a.view(), b.view(), view(at, {3}), true, out.view(), {nullptr, 2}, options);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t e = i >= at[1];
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias[e * n + j], size = std::fabs(sum);
      for (int64_t c = 0; c < k; ++c) {
        sum += a[i * k + c] * b[(e * n + j) * k + c];
        size += std::fabs(a[i * k + c] * b[(e * n + j) * k + c]);
      }
      ASSERT_NEAR(out[i * n + j], sum, size * (2 + 2 * std::sqrt(k)) * 6e-8 + out.rounding(sum)) << i << ", " << j;
    }
  }
}

TEST(GemmOptions, BiasIsAddedBeforeRounding) {
  Rng rng(12);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      check_bias(dtype, 48, rng);
      check_bias(dtype, 1, rng);  // rows and columns of the output have the same stride
    }
  });
}

// A hot expert with a small gradient is summed in parts; all rows count, whatever the dtype of the result.
TEST(GemmOptions, ManyRowsOfASmallGradient) {
  Rng rng(13);
  const int64_t rows = 9000, m = 3, n = 7;
  const Array a = Array(DType::f32, {rows, m}).randomise(rng), b = Array(DType::f32, {rows, n}).randomise(rng);
  const std::vector<int64_t> at = {0, 10, 10, rows};
  for_each_isa([&] {
    for (double beta : {0.0, 1.0}) {
      Array start(DType::f32, {3, m, n});
      if (beta == 1.0) start.randomise(rng);
      const auto run = [&](int threads, Array& out) {
        gemm_k_grouped(a.view(), b.view(), view(at, {4}), beta, out.view(), {nullptr, threads});
      };
      Array out = start;
      run(2, out);
      for (int64_t i = 0; i < m * n; ++i) {
        double sum = beta == 1.0 ? start[2 * m * n + i] : 0, size = 0;
        for (int64_t r = 10; r < rows; ++r) {
          sum += a[r * m + i / n] * b[r * n + i % n];
          size += std::fabs(a[r * m + i / n] * b[r * n + i % n]);
        }
        ASSERT_NEAR(out[2 * m * n + i], sum, size * 2 * std::sqrt(rows) * 6e-8);
      }
      expect_same_bits(start, run);
    }
  });
}

}  // namespace
}  // namespace xt::test
