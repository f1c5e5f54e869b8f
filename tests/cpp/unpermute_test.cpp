#include "xtuner/ops/unpermute.h"

#include "helpers.h"

namespace xt::test {
namespace {

// A random routing: each choice has a row of its own or is dropped; some rows belong to nobody.
struct Case {
  int64_t t, k, h, r;
  std::vector<int32_t> row_of, src;
  std::vector<float> probs;

  Case(Rng& rng, int64_t tokens, int64_t choices, int64_t hidden) : t(tokens), k(choices), h(hidden), r(t * k + 4) {
    src.assign(r, -1);
    for (int64_t i = 0; i < t * k; ++i) src[i] = rng() % 6 == 0 ? -1 : static_cast<int32_t>(i);
    std::shuffle(src.begin(), src.end(), rng);
    row_of.assign(t * k, -1);
    for (int64_t row = 0; row < r; ++row) {
      if (src[row] >= 0) row_of[src[row]] = static_cast<int32_t>(row);
    }
    for (int64_t i = 0; i < t * k; ++i) probs.push_back(static_cast<float>(rng() % 1000) / 500 - 1);
  }

  // Rows that nobody may read stay NaN.
  Array rows(DType dtype, Rng& rng) const {
    Array y(dtype, {r, h});
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < r * h; ++i) {
      if (src[i / h] >= 0) y.set(i, normal(rng));
    }
    return y;
  }
};

void check_forward(const Case& c, DType dtype, bool weighted, Rng& rng) {
  const Array y = c.rows(dtype, rng);
  const Tensor probs = view(c.probs, {c.t, c.k});
  const auto run = [&](int threads, Array& out) {
    unpermute(y.view(), view(c.row_of, {c.t, c.k}), weighted ? &probs : nullptr, out.view(), {nullptr, threads});
  };
  Array out(dtype, {c.t, c.h});
  run(1, out);
  for (int64_t i = 0; i < c.t * c.h; ++i) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t choice = i / c.h * c.k + k, row = c.row_of[choice];
      if (row < 0) continue;
      const double term = (weighted ? c.probs[choice] : 1.0) * y[row * c.h + i % c.h];
      sum += term;
      size += std::fabs(term);
    }
    ASSERT_NEAR(out[i], sum, size * c.k * 1.2e-7 + out.rounding(sum)) << "token " << i / c.h << " H=" << c.h;
  }
  expect_same_bits(Array(dtype, {c.t, c.h}), run);
}

void check_backward(const Case& c, DType dtype, bool weighted, bool want_dprobs, Rng& rng) {
  const Array y = c.rows(dtype, rng), dout = Array(dtype, {c.t, c.h}).randomise(rng);
  const Tensor probs = view(c.probs, {c.t, c.k}), ty = y.view();
  std::vector<float> first;
  const auto run = [&](int threads, Array& dy) {
    std::vector<float> dprobs(c.t * c.k, NAN);
    const Tensor tdp = view(dprobs, {c.t, c.k});
    unpermute_bwd(dout.view(), want_dprobs ? &ty : nullptr, view(c.src, {c.r}), view(c.row_of, {c.t, c.k}),
                  weighted ? &probs : nullptr, dy.view(), want_dprobs ? &tdp : nullptr, {nullptr, threads});
    if (!want_dprobs) return;
    if (threads == 1) first = dprobs;
    EXPECT_EQ(dprobs, first) << threads << " threads";
  };
  Array dy(dtype, {c.r, c.h});
  run(1, dy);
  for (int64_t i = 0; i < c.r * c.h; ++i) {
    const int64_t choice = c.src[i / c.h];
    const double wanted =
        choice < 0 ? 0.0 : (weighted ? c.probs[choice] : 1.0) * dout[choice / c.k * c.h + i % c.h];
    ASSERT_NEAR(dy[i], wanted, dy.rounding(wanted)) << "row " << i / c.h;
  }
  for (int64_t i = 0; want_dprobs && i < c.t * c.k; ++i) {
    double sum = 0, size = 0;
    for (int64_t j = 0; c.row_of[i] >= 0 && j < c.h; ++j) {
      const double term = dout[i / c.k * c.h + j] * y[c.row_of[i] * c.h + j];
      sum += term;
      size += std::fabs(term);
    }
    ASSERT_NEAR(first[i], sum, size * 1e-6) << "choice " << i;
  }
  expect_same_bits(Array(dtype, {c.r, c.h}), run);
}

TEST(Unpermute, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t h : odd_sizes) {
        const Case c(rng, pick(rng, {0, 1, 40, 130}), pick(rng, {1, 2, 3, 8}), h);
        for (bool weighted : {true, false}) {
          check_forward(c, dtype, weighted, rng);
          for (bool want_dprobs : {true, false}) check_backward(c, dtype, weighted, want_dprobs, rng);
        }
      }
      const Case none(rng, 5, 0, 16);  // no choices: zeros
      check_forward(none, dtype, true, rng);
      check_backward(none, dtype, true, true, rng);
    }
  });
}

TEST(Unpermute, NamesBadArguments) {
  Rng rng(2);
  Case c(rng, 4, 2, 8);
  const Array y(DType::f32, {c.r, 8}), out(DType::f32, {4, 8});
  const auto forward = [&] { unpermute(y.view(), view(c.row_of, {4, 2}), nullptr, out.view(), {}); };
  const auto backward = [&](bool dprobs) {
    const Tensor dp = view(c.probs, {4, 2});
    unpermute_bwd(out.view(), nullptr, view(c.src, {c.r}), view(c.row_of, {4, 2}), nullptr, y.view(), dprobs ? &dp : nullptr, {});
  };
  expect_error([&] { backward(true); }, "unpermute_bwd: dprobs needs y, got none");
  const std::vector<int32_t> good = c.row_of;
  c.row_of[3] = 12;
  expect_error(forward, "unpermute: row_of[1, 1] must be in [-1, R=12), got 12");
  c.row_of = good;
  c.row_of[0] = c.row_of[1] = 3;
  expect_error([&] { backward(false); }, "src and row_of must be each other's inverse, but row_of[0, ");
  const Tensor half = Tensor(y.view().data, DType::f32, {2, 4});
  expect_error([&] { unpermute(y.view(), view(good, {4, 2}), &half, out.view(), {}); },
               "probs must be float32 [T=4, K=2], got float32 [2, 4] on cpu");
}

}  // namespace
}  // namespace xt::test
