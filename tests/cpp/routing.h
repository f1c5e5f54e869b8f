// Routings for the tests of the ops that move rows.
#pragma once
#include "helpers.h"

namespace xt::test {

// Each choice has a row of its own or is dropped; some rows belong to nobody. One hot: nothing is dropped.
struct RandomRouting {
  int64_t t, k, r;
  std::vector<int32_t> row_of, src;
  std::vector<float> probs;

  RandomRouting(Rng& rng, int64_t tokens, int64_t choices, Load load) : t(tokens), k(choices), r(t * k + 4) {
    src.assign(r, -1);
    for (int64_t i = 0; i < t * k && load != Load::empty; ++i) {
      if (load == Load::one_hot || rng() % 6) src[i] = static_cast<int32_t>(i);
    }
    std::shuffle(src.begin(), src.end(), rng);
    row_of.assign(t * k, -1);
    for (int64_t row = 0; row < r; ++row) {
      if (src[row] >= 0) row_of[src[row]] = static_cast<int32_t>(row);
    }
    for (int64_t i = 0; i < t * k; ++i) probs.push_back(static_cast<float>(rng() % 1000) / 500 - 1);
  }

  Tensor row_of_view() const { return view(row_of, {t, k}); }
  Tensor src_view() const { return view(src, {r}); }
  Tensor probs_view() const { return view(probs, {t, k}); }

  // Random rows [R, H]; those that nobody may read stay NaN.
  Array rows(DType dtype, int64_t h, Rng& rng) const {
    Array y(dtype, {r, h});
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < r * h; ++i) {
      if (src[i / h] >= 0) y.set(i, normal(rng));
    }
    return y;
  }
};

}  // namespace xt::test
