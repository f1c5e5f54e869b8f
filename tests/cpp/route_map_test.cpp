#include "xtuner/ops/route_map.h"

#include "helpers.h"

namespace xt::test {
namespace {

struct Routing {
  std::vector<int32_t> counts, row_of, src;
  std::vector<int64_t> offsets;
  bool operator==(const Routing& o) const {
    return counts == o.counts && row_of == o.row_of && src == o.src && offsets == o.offsets;
  }
};

template <class Index>
Routing run(const std::vector<Index>& idx, int64_t t, int64_t k, int64_t e, int64_t r, int64_t align, int threads) {
  Routing m{std::vector<int32_t>(e, -7), std::vector<int32_t>(t * k, -7), std::vector<int32_t>(r, -7),
            std::vector<int64_t>(e + 1, -7)};
  route_map(view(idx, {t, k}), align, view(m.counts, {e}), view(m.offsets, {e + 1}), view(m.row_of, {t, k}),
            view(m.src, {r}), {nullptr, threads});
  return m;
}

template <class Index>
Routing reference(const std::vector<Index>& idx, int64_t e_count, int64_t r, int64_t align) {
  Routing m{std::vector<int32_t>(e_count), std::vector<int32_t>(idx.size(), -1), std::vector<int32_t>(r, -1), {0}};
  std::vector<std::vector<int32_t>> choices(e_count);
  for (size_t i = 0; i < idx.size(); ++i) {
    if (idx[i] >= 0) choices[idx[i]].push_back(static_cast<int32_t>(i));
  }
  for (int64_t e = 0; e < e_count; ++e) {
    int64_t row = m.offsets[e];
    for (int32_t i : choices[e]) {
      m.row_of[i] = static_cast<int32_t>(row);
      m.src[row++] = i;
    }
    m.counts[e] = static_cast<int32_t>(choices[e].size());
    m.offsets.push_back((row + align - 1) / align * align);
  }
  return m;
}

template <class Index>
void check_random(unsigned seed) {
  Rng rng(seed);
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t t = pick(rng, {0, 1, 5, 127, 128, 129, 6000}), k = pick(rng, {0, 1, 2, 3, 8}), e = pick(rng, {1, 3, 16, 128});
    const int64_t align = pick(rng, {1, 16, 128});
    std::vector<Index> idx(t * k);
    const bool hot = rng() % 4 == 0;
    for (Index& i : idx) i = rng() % 8 == 0 ? -1 : static_cast<Index>(hot ? e - 1 : rng() % e);
    const int64_t r = t * k + e * (align - 1) + static_cast<int64_t>(rng() % 3);
    const Routing wanted = reference(idx, e, r, align);
    for (int threads : {1, 2, 3, 8}) {
      EXPECT_TRUE(run(idx, t, k, e, r, align, threads) == wanted)
          << "T=" << t << " K=" << k << " E=" << e << " align=" << align << " threads=" << threads;
    }
  }
}

TEST(RouteMap, MatchesReferenceInt32) { check_random<int32_t>(1); }
TEST(RouteMap, MatchesReferenceInt64) { check_random<int64_t>(2); }

TEST(RouteMap, Fuzz) {
  Rng rng(3);
  fuzz(3, rng, [&](const FuzzCase& c) {
    const int64_t t = c.sizes[0], k = c.sizes[1], e = c.sizes[2];
    const int64_t align = pick(rng, {1, 7, 128}), r = t * k + e * (align - 1) + pick(rng, {0, 1, 8});
    const auto idx = topk_of_load<int32_t>(rng, c.load, t, k, e);
    const Routing wanted = reference(idx, e, r, align);
    for (int threads : {1, 2, 3, 8}) {
      EXPECT_TRUE(run(idx, t, k, e, r, align, threads) == wanted) << "align=" << align << " threads=" << threads;
    }
  });
}

TEST(RouteMap, NamesTheFirstBadIndexWhateverTheThreadCount) {
  std::vector<int64_t> idx(80000, 1);
  idx[9001] = 7;
  idx[70000] = -2;
  for (int threads : {1, 8}) {
    expect_error([&] { run(idx, 40000, 2, 4, 80000, 1, threads); },
                 "route_map: topk_idx[4500, 1] (token 4500) must be in [-1, E=4), got 7");
  }
  idx[9001] = 0;
  expect_error([&] { run(idx, 40000, 2, 4, 80000, 1, 2); },
               "topk_idx[35000, 0] (token 35000) must be in [-1, E=4), got -2");
}

TEST(RouteMap, RefusesWhatItCannotHold) {
  const std::vector<int32_t> idx = {0, 1, 1, 0};
  expect_error([&] { run(idx, 2, 2, 2, 3, 1, 1); }, "src has R=3 rows, but the routing of 2 tokens needs 4");
  expect_error([&] { run(idx, 2, 2, 2, 4, 16, 1); }, "needs 32 (with align=16)");
  expect_error([&] { run(idx, 2, 2, 2, 4, 0, 1); }, "align must be at least 1, got 0");
  const std::vector<float> wrong(4);
  expect_error([&] { run(wrong, 2, 2, 2, 4, 1, 1); }, "topk_idx must be int32 or int64 [T, K], got float32 [2, 2] on cpu");
}

}  // namespace
}  // namespace xt::test
