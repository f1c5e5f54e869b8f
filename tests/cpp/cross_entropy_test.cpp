#include "xtuner/ops/cross_entropy.h"

#include "helpers.h"

namespace xt::test {
namespace {

void check(DType dtype, int64_t tokens, int64_t vocab, double scale, Rng& rng) {
  SCOPED_TRACE("tokens " + std::to_string(tokens) + ", vocab " + std::to_string(vocab));
  Array logits = Array(dtype, {tokens, vocab}).randomise(rng);
  for (int64_t i = 0; i < logits.count(); ++i) logits.set(i, scale * logits[i]);
  const Array weights = Array(DType::f32, {tokens}).randomise(rng);
  std::vector<int64_t> labels(tokens);
  for (int64_t& l : labels) l = rng() % vocab;
  Array losses(DType::f32, {tokens}), gradient = logits;
  const auto run = [&](int threads, bool with_gradient, Array& x, Array& out) {
    cross_entropy(x.view(), view(labels, {tokens}), weights.view(), with_gradient, out.view(), {nullptr, threads});
  };
  run(1, true, gradient, losses);
  for (int64_t t = 0; t < tokens; ++t) {
    double most = -INFINITY, total = 0;
    for (int64_t i = 0; i < vocab; ++i) most = std::fmax(most, logits[t * vocab + i]);
    for (int64_t i = 0; i < vocab; ++i) total += std::exp(logits[t * vocab + i] - most);
    const double lse = most + std::log(total), loss = lse - logits[t * vocab + labels[t]], w = weights[t];
    // logsumexp and its differences round at the size of the logits
    const double slack = std::ldexp(1.0, -22) * (std::fabs(lse) + std::fabs(most) + vocab / 16.0 + 8);
    ASSERT_NEAR(losses[t], w * loss, std::fabs(w) * (slack + 1e-6 * loss)) << "token " << t;
    for (int64_t i = 0; i < vocab; ++i) {
      const double p = std::exp(logits[t * vocab + i] - lse), wanted = w * (p - (i == labels[t]));
      ASSERT_NEAR(gradient[t * vocab + i], wanted, std::fabs(w) * (p * slack + 1e-7) + gradient.rounding(wanted));
    }
  }
  Array kept = logits, again(DType::f32, {tokens});
  run(1, false, kept, again);
  EXPECT_EQ(kept.bytes(), logits.bytes()) << "without gradient the logits stay";
  EXPECT_EQ(again.bytes(), losses.bytes());
  expect_same_bits(logits, [&](int threads, Array& x) { run(threads, true, x, again); });
  expect_same_bits(losses, [&](int threads, Array& out) { run(threads, false, kept, out); });
}

TEST(CrossEntropy, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t vocab : odd_sizes) check(dtype, pick(rng, {1, 2, 7}), vocab, pick(rng, {1, 20}), rng);
      for (int64_t tokens : {0, 1, 8, 128, 129}) check(dtype, tokens, pick(rng, {3, 40}), 3, rng);
      check(dtype, 2, 8192, 5, rng);
    }
  });
}

TEST(CrossEntropy, FarFromZeroAndNaN) {
  for_each_isa([&] {
    std::vector<float> x(32, 1000.0f), losses(2);
    x[0] = 1010.0f;
    x[20] = NAN;
    const std::vector<int64_t> labels = {0, 1};
    const std::vector<float> weights = {1, 1};
    cross_entropy(view(x, {2, 16}), view(labels, {2}), view(weights, {2}), true, view(losses, {2}), {});
    EXPECT_NEAR(losses[0], std::log1p(15 * std::exp(-10.0)), 2e-4);
    EXPECT_TRUE(std::isnan(losses[1]));
  });
}

TEST(CrossEntropy, NamesBadArguments) {
  const Array logits(DType::f32, {2, 6}), none(DType::f32, {2, 0}), weights(DType::f32, {2});
  const std::vector<int64_t> labels = {5, 6};
  expect_error([&] { cross_entropy(logits.view(), view(labels, {2}), weights.view(), true, weights.view(), {}); },
               "cross_entropy: labels[1] must be in [0, V=6), got 6");
  expect_error([&] { cross_entropy(none.view(), view(labels, {2}), weights.view(), true, weights.view(), {}); },
               "cross_entropy: logits must have at least one column, got none");
  expect_error([&] { cross_entropy(logits.view(), weights.view(), weights.view(), true, weights.view(), {}); },
               "cross_entropy: labels must be int64 [T=2], got float32 [2] on cpu");
}

}  // namespace
}  // namespace xt::test
