#include "xtuner/ops/topk_softmax.h"

#include "helpers.h"

namespace xt::test {
namespace {

struct Outputs {
  Array weights, probs, logsumexp, counts, prob_sum, z_sum, entropy_sum, workspace;
  std::vector<int64_t> idx;
  int64_t tokens, choices;

  Outputs(int64_t t, int64_t e, int64_t k)
      : weights(DType::f32, {t, k}),
        probs(DType::f32, {t, e}),
        logsumexp(DType::f32, {t}),
        counts(DType::f32, {e}),
        prob_sum(DType::f32, {e}),
        z_sum(DType::f32, {}),
        entropy_sum(DType::f32, {}),
        workspace(DType::f32, {(t + topk_softmax_block_tokens - 1) / topk_softmax_block_tokens, 2 * e + 2}),
        idx(t * k, -7),
        tokens(t),
        choices(k) {}
  TopkSoftmaxOutputs views() const {
    return {weights.view(), view(idx, {tokens, choices}), probs.view(), logsumexp.view(),
            counts.view(), prob_sum.view(), z_sum.view(), entropy_sum.view()};
  }
  // All results in one array, so that they can be compared bit by bit.
  Array all() const {
    const std::vector<const Array*> parts = {&weights, &probs, &logsumexp, &counts, &prob_sum, &z_sum, &entropy_sum};
    int64_t n = static_cast<int64_t>(idx.size()), at = 0;
    for (const Array* part : parts) n += part->count();
    Array out(DType::f32, {n});
    for (const Array* part : parts) {
      for (int64_t i = 0; i < part->count(); ++i) out.set(at++, (*part)[i]);
    }
    for (int64_t i : idx) out.set(at++, static_cast<double>(i));
    return out;
  }
};

// What a token's choices must be: of the same probs (+ bias), by a stable sort.
std::vector<int64_t> largest_of(const Array& probs, int64_t t, int64_t e, int64_t k, const std::vector<float>* bias) {
  std::vector<float> scores(e);
  std::vector<int64_t> order(e);
  for (int64_t i = 0; i < e; ++i) {
    scores[i] = static_cast<float>(probs[t * e + i]);
    if (bias) scores[i] += (*bias)[i];
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  order.resize(k);
  return order;
}

void check_gradient(const Outputs& out, const Array& logits, int64_t t, int64_t e, int64_t k, bool normalise, Rng& rng) {
  const Array dweights = Array(DType::f32, {t, k}).randomise(rng), dprob_sum = Array(DType::f32, {e}).randomise(rng);
  const Array dz_sum = Array(DType::f32, {}).randomise(rng);
  const Tensor idx = view(out.idx, {t, k}), dw = dweights.view(), dp = dprob_sum.view(), dz = dz_sum.view();
  const auto run = [&](const Tensor* w, const Tensor* p, const Tensor* z, int threads, Array& to) {
    topk_softmax_bwd(w, p, z, out.probs.view(), out.logsumexp.view(), idx, normalise, to.view(), {nullptr, threads});
  };
  Array all(DType::f32, {t, e}), weights_only = all, sums_only = all;
  run(&dw, &dp, &dz, 1, all);
  run(&dw, nullptr, nullptr, 1, weights_only);
  run(nullptr, &dp, &dz, 1, sums_only);
  expect_same_bits(all, [&](int threads, Array& to) { run(&dw, &dp, &dz, threads, to); });
  for (int64_t i = 0; i < t; ++i) {
    std::vector<double> p(e), by_weights(e, 0), by_sums(e);
    double most = -INFINITY, total = 0, chosen = 0, along = 0, mean_w = 0, mean_s = 0, size = std::fabs(dz_sum[0]);
    for (int64_t j = 0; j < e; ++j) most = std::fmax(most, logits[i * e + j]);
    for (int64_t j = 0; j < e; ++j) total += p[j] = std::exp(logits[i * e + j] - most);
    const double lse = most + std::log(total);
    for (double& x : p) x /= total;
    for (int64_t c = 0; c < k; ++c) {
      chosen += p[out.idx[i * k + c]];
      along += p[out.idx[i * k + c]] * dweights[i * k + c];
    }
    for (int64_t c = 0; c < k; ++c) {
      const double d = dweights[i * k + c];
      by_weights[out.idx[i * k + c]] += normalise ? (d - along / chosen) / chosen : d;
      size += std::fabs(d) * (normalise ? 2 / chosen : 1);
    }
    for (int64_t j = 0; j < e; ++j) {
      mean_w += p[j] * by_weights[j];
      mean_s += p[j] * dprob_sum[j];
      size += p[j] * std::fabs(dprob_sum[j]);
    }
    for (int64_t j = 0; j < e; ++j) {
      const double w = p[j] * (by_weights[j] - mean_w), s = p[j] * (dprob_sum[j] - mean_s + 2 * dz_sum[0] * lse);
      // exp is off by 2e-7 and by the rounding of its argument; sums over e by their roundings
      const double slack = p[j] * (size + std::fabs(dprob_sum[j])) * (4e-7 * (4 + std::fabs(lse)) + e * 6e-8) + 1e-30;
      ASSERT_NEAR(weights_only[i * e + j], w, slack) << "token " << i << ", expert " << j;
      ASSERT_NEAR(sums_only[i * e + j], s, slack * (1 + std::fabs(lse))) << "token " << i << ", expert " << j;
      ASSERT_NEAR(all[i * e + j], w + s, slack * (2 + std::fabs(lse))) << "token " << i << ", expert " << j;
    }
  }
}

void check(int64_t t, int64_t e, int64_t k, bool normalise, bool biased, double scale, Rng& rng) {
  SCOPED_TRACE("tokens " + std::to_string(t) + ", experts " + std::to_string(e) + ", choices " + std::to_string(k));
  Array logits = Array(DType::f32, {t, e}).randomise(rng);
  for (int64_t i = 0; i < logits.count(); ++i) logits.set(i, scale * logits[i]);
  std::vector<float> bias(e);
  for (float& b : bias) b = std::normal_distribution<float>()(rng) / static_cast<float>(e);
  const Tensor bias_view = view(bias, {e});
  Outputs out(t, e, k);
  const auto run = [&](int threads, const Tensor* given, const Outputs& to) {
    topk_softmax(logits.view(), biased ? &bias_view : nullptr, given, normalise, to.views(), to.workspace.view(),
                 {nullptr, threads});
  };
  run(1, nullptr, out);
  expect_same_bits(out.all(), [&](int threads, Array& to) {
    const Outputs again(t, e, k);
    run(threads, nullptr, again);
    to = again.all();
  });

  std::vector<double> counts(e, 0), prob_sum(e, 0);
  double z_sum = 0, entropy_sum = 0, lse_size = 0;
  for (int64_t i = 0; i < t; ++i) {
    double most = -INFINITY, total = 0, chosen = 0;
    for (int64_t j = 0; j < e; ++j) most = std::fmax(most, logits[i * e + j]);
    for (int64_t j = 0; j < e; ++j) total += std::exp(logits[i * e + j] - most);
    const double lse = most + std::log(total), slack = 4e-7 * (4 + std::fabs(lse) + std::fabs(most)) + e * 1e-8;
    ASSERT_NEAR(out.logsumexp[i], lse, slack);
    for (int64_t j = 0; j < e; ++j) {
      const double p = std::exp(logits[i * e + j] - lse);
      ASSERT_NEAR(out.probs[i * e + j], p, 2 * p * slack + 2e-38) << "token " << i << ", expert " << j;
      prob_sum[j] += p;
      entropy_sum += p * (lse - logits[i * e + j]);
    }
    z_sum += lse * lse;
    lse_size += std::fabs(lse) + std::fabs(most);
    const std::vector<int64_t> wanted = largest_of(out.probs, i, e, k, biased ? &bias : nullptr);
    ASSERT_EQ(std::vector<int64_t>(out.idx.begin() + i * k, out.idx.begin() + (i + 1) * k), wanted) << "token " << i;
    for (int64_t c : wanted) chosen += out.probs[i * e + c], counts[c] += 1;
    for (int64_t c = 0; c < k; ++c) {
      const double w = out.probs[i * e + wanted[c]] / (normalise ? chosen : 1);
      ASSERT_NEAR(out.weights[i * k + c], w, w * 1e-7 * (k + 2));
    }
  }
  const double roundings = 6e-8 * (t + 16);
  for (int64_t j = 0; j < e; ++j) {
    ASSERT_EQ(out.counts[j], counts[j]);
    ASSERT_NEAR(out.prob_sum[j], prob_sum[j], prob_sum[j] * (roundings + 4e-6 + e * 2e-8) + 1e-30);
  }
  ASSERT_NEAR(out.z_sum[0], z_sum, z_sum * (roundings + 4e-6));
  ASSERT_NEAR(out.entropy_sum[0], entropy_sum, (lse_size + entropy_sum) * (roundings + 4e-6 + e * 2e-8));
  check_gradient(out, logits, t, e, k, normalise, rng);

  // The same choices given: the same bits.
  Outputs replayed(t, e, k);
  const Tensor given = view(out.idx, {t, k});
  run(1, &given, replayed);
  EXPECT_EQ(replayed.all().bytes(), out.all().bytes());
}

TEST(TopkSoftmax, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (int64_t e : odd_sizes) {
      for (bool normalise : {false, true}) {
        check(pick(rng, {1, 2, 7, 64}), e, std::min<int64_t>(e, pick(rng, {1, 2, 4, 8})), normalise, rng() % 2, 1, rng);
      }
    }
    for (int64_t t : {0, 1, 8, 63, 64, 65, 128, 129, 768}) check(t, pick(rng, {4, 32}), 3, true, false, 3, rng);
    check(5, 16, 16, true, true, 1, rng);
    check(3, 512, 8, true, false, 10, rng);
  });
}

TEST(TopkSoftmax, OfEqualsTheFirstAndNaN) {
  for_each_isa([&] {
    Array logits(DType::f32, {2, 20});
    logits.fill(1);
    logits.set(20 + 17, NAN);
    const Outputs out(2, 20, 3);
    topk_softmax(logits.view(), nullptr, nullptr, true, out.views(), out.workspace.view(), {});
    EXPECT_EQ(out.idx, (std::vector<int64_t>{0, 1, 2, 0, 1, 2}));
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_NEAR(out.weights[i], 1.0 / 3, 1e-7);
      EXPECT_TRUE(std::isnan(out.weights[3 + i]));
    }
  });
}

TEST(TopkSoftmax, NamesBadArguments) {
  const Array logits(DType::f32, {2, 4}), bias(DType::f32, {3});
  const Outputs out(2, 4, 1), wide(2, 4, 5);
  const std::vector<int64_t> choices = {3, 4};
  const Tensor given = view(choices, {2, 1}), bias_view = bias.view();
  const auto run = [&](const Tensor* b, const Tensor* idx, const Outputs& to) {
    topk_softmax(logits.view(), b, idx, true, to.views(), to.workspace.view(), {});
  };
  expect_error([&] { run(nullptr, &given, out); }, "topk_softmax: topk_idx[1, 0] must be in [0, E=4), got 4");
  expect_error([&] { run(&bias_view, nullptr, out); }, "topk_softmax: choice_bias must be float32 [E=4], got float32 [3] on cpu");
  expect_error([&] { run(nullptr, nullptr, wide); }, "topk_softmax: K must be in [1, E=4], got 5");
  expect_error([&] {
    topk_softmax_bwd(nullptr, nullptr, nullptr, logits.view(), bias.view(), given, true, logits.view(), {});
  }, "topk_softmax_bwd: logsumexp must be float32 [T=2], got float32 [3] on cpu");
}

}  // namespace
}  // namespace xt::test
