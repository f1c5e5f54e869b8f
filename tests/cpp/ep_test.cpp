// The expert-parallel ops with threads as ranks, on plain memory: what ThreadSanitizer can see through.
#include <thread>

#include "cpu/shared_heap.h"
#include "ep_cases.h"

namespace xt::test {
namespace {

// Memory of a group whose ranks are threads of this process.
class ThreadRanks {
 public:
  ThreadRanks(int world, int64_t data_bytes, double timeout_s = 60) : world_(world) {
    all_.world = world;
    all_.timeout_s = timeout_s;
    all_.index_bytes = 1 << 16;
    all_.data_bytes = data_bytes;
    for (int r = 0; r < world; ++r) {
      memory_.emplace_back(static_cast<size_t>(signal_bytes + all_.block_bytes()) / 64 + 2);
      all_.signal[r] = memory_.back().data();
      all_.block[r] = static_cast<char*>(all_.signal[r]) + signal_bytes;
    }
  }
  Peers peers(int rank) const {
    Peers p = all_;
    p.rank = rank;
    return p;
  }
  // body(rank, peers) on every rank at once; the messages of those that threw.
  std::vector<std::string> run(const std::function<void(int, const Peers&)>& body) const {
    std::vector<std::string> errors(world_);
    std::vector<std::thread> threads;
    for (int r = 0; r < world_; ++r) {
      threads.emplace_back([&, r] {
        try {
          body(r, peers(r));
        } catch (const Error& e) {
          errors[r] = e.what();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    return errors;
  }

 private:
  struct alignas(64) Line {
    char bytes[64] = {};
  };
  int world_;
  Peers all_;
  std::vector<std::vector<Line>> memory_;
};

void expect_no_errors(const std::vector<std::string>& errors) {
  for (const std::string& e : errors) EXPECT_EQ(e, "");
}

TEST(Ep, SameBitsAsOneRankWithAllExperts) {
  Rng rng(1);
  for_each_isa([&] {
    for (int world : {1, 2, 4, 8}) {
      const ThreadRanks ranks(world, int64_t{8} << 20);
      for (DType dtype : {DType::f32, DType::bf16}) {
        for (int64_t hidden : {1, 17, 128, 130}) {
          const auto loads = random_loads(rng, world, dtype, hidden);
          std::vector<StepResult> results(world);
          expect_no_errors(ranks.run([&](int r, const Peers& p) { results[r] = ep_step(loads[r], p, 1, r % 3); }));
          for (int r = 0; r < world; ++r) {
            EXPECT_TRUE(results[r] == local_step(loads[r])) << "rank " << r << " of " << world << " H=" << hidden;
          }
        }
      }
    }
  });
}

TEST(Ep, SameBitsForAnyThreadCount) {
  Rng rng(2);
  const ThreadRanks ranks(2, int64_t{8} << 20);
  for (DType dtype : {DType::f32, DType::bf16}) {
    const auto loads = random_loads(rng, 2, dtype, 129);
    for (int threads : {1, 2, 3, 8}) {
      std::vector<StepResult> results(2);
      expect_no_errors(ranks.run([&](int r, const Peers& p) { results[r] = ep_step(loads[r], p, threads); }));
      for (int r = 0; r < 2; ++r) EXPECT_TRUE(results[r] == local_step(loads[r])) << threads << " threads";
    }
  }
}

// Rows of an expert come in the order (rank, token, k), as on one rank that holds all tokens; rows past the last are zero.
void check_rows(Rng& rng, int world) {
  const ThreadRanks ranks(world, int64_t{8} << 20);
  const auto loads = random_loads(rng, world, DType::f32, 8);
  const int64_t here = loads[0].experts / world, k = loads[0].k, spare = 3;
  std::vector<std::vector<double>> wanted(world), got(world), wanted_scales(world), got_scales(world);
  for (int64_t e = 0; e < loads[0].experts; ++e) {
    for (const RankLoad& load : loads) {
      for (size_t i = 0; i < load.topk_idx.size(); ++i) {
        if (load.topk_idx[i] != e) continue;
        const int64_t t = static_cast<int64_t>(i) / k;
        for (int64_t h = 0; h < 8; ++h) wanted[e / here].push_back(load.x[t * 8 + h]);
        for (int64_t s = 0; s < 2; ++s) wanted_scales[e / here].push_back(load.dout[t * 8 + s]);
      }
    }
  }
  expect_no_errors(ranks.run([&](int r, const Peers& p) {
    const RankLoad& load = loads[r];
    const OwnedRoute maps(load, p, spare);
    const int64_t ld = load.tokens() + 2, out_ld = maps.rows + 1;
    Array out(DType::f32, {maps.rows, 8}), scales(DType::f32, {2, ld}), out_scales(DType::f32, {2, out_ld});
    DataArea area(p);
    const Tensor out_t = area.rows(out), out_scales_t = area.rows(out_scales);
    for (int64_t t = 0; t < load.tokens(); ++t) {
      for (int64_t s = 0; s < 2; ++s) scales.set(s * ld + t, load.dout[t * 8 + s]);
    }
    const Tensor scales_t = scales.view();
    ep_dispatch(load.x.view(), &scales_t, maps.route(), p, out_t, &out_scales_t, {});
    copy(out_t, out.view());
    copy(out_scales_t, out_scales.view());
    for (int64_t i = 0; i < out.count(); ++i) got[r].push_back(out[i]);
    for (int64_t i = 0; i < 2 * out_ld; ++i) got_scales[r].push_back(out_scales[i % 2 * out_ld + i / 2]);
  }));
  for (int r = 0; r < world; ++r) {
    wanted[r].resize(wanted[r].size() + spare * 8);
    wanted_scales[r].resize(wanted_scales[r].size() + (spare + 1) * 2);
    EXPECT_EQ(got[r], wanted[r]) << "rank " << r << " of " << world;
    EXPECT_EQ(got_scales[r], wanted_scales[r]) << "rank " << r << " of " << world;
  }
}

TEST(Ep, RowsComeInTheOrderOfOneRankWithAllTokens) {
  Rng rng(3);
  for (int trial = 0; trial < 6; ++trial) {
    for (int world : {1, 2, 4}) check_rows(rng, world);
  }
}

TEST(Ep, PrepareTellsRankAndRow) {
  const ThreadRanks ranks(2, 1 << 20);
  // Token 0: three experts of rank 1. Token 1: home and away. Token 2: at home only. Token 3: dropped.
  const std::vector<int32_t> idx = {2, 3, 2, 0, 3, 1, 0, 1, 0, -1, -1, -1};
  const RankLoad busy = {4, 3, idx, std::vector<float>(12, 1.0f), Array(DType::f32, {4, 4}), Array(DType::f32, {4, 4})};
  const RankLoad idle = {4, 3, {}, {}, Array(DType::f32, {0, 4}), Array(DType::f32, {0, 4})};
  expect_no_errors(ranks.run([&](int r, const Peers& p) {
    const OwnedRoute maps(r == 0 ? busy : idle, p), bounded(r == 0 ? busy : idle, p, 0, 1, 4);
    EXPECT_EQ(maps.counts, (std::vector<int32_t>{3, 2, 2, 2, 0, 0, 0, 0}));
    EXPECT_EQ(maps.offsets, (r == 0 ? std::vector<int64_t>{0, 3, 5} : std::vector<int64_t>{0, 2, 4}));
    // With room for 4 rows, the last of rank 0 finds none; it is counted all the same.
    EXPECT_EQ(bounded.counts, maps.counts);
    EXPECT_EQ(bounded.offsets, (r == 0 ? std::vector<int64_t>{0, 3, 4} : maps.offsets));
    if (r != 0) return;
    std::vector<int32_t> dest = {1, 0, 1, 2, 1, 1, 0, 0, 1, 3, 0, 3, 0, 1, 0, 4, 0, 2, -1, -1, -1, -1, -1, -1};
    EXPECT_EQ(maps.dest, dest);
    dest[14] = dest[15] = -1;
    EXPECT_EQ(bounded.dest, dest);
  }));
}

TEST(Ep, AMissingRankIsNamedWithinTheBound) {
  Rng rng(4);
  RankLoad load = {4, 1, {0, 3, 3}, {1, 1, 1}, Array(DType::f32, {3, 4}), Array(DType::f32, {3, 4})};
  const ThreadRanks ranks(2, 1 << 20, 0.3);
  const auto errors = ranks.run([&](int r, const Peers& p) {
    const OwnedRoute maps(load, p);
    const Tensor out = DataArea(p).rows(Array(DType::f32, {maps.rows, 4}));
    if (r == 0) ep_dispatch(load.x.view(), nullptr, maps.route(), p, out, nullptr, {});
  });
  EXPECT_EQ(errors[1], "");
  EXPECT_EQ(errors[0],
            "ep_dispatch: rank 0 waited 0.3 s for rank 1: expected exchange 2, seen 1; rank 1 has 1 rows "
            "(expert 0: 1) for this rank, this rank has 2 rows (expert 3: 2) for it");
  // The group is broken for good, on both sides.
  const auto later = ranks.run([&](int, const Peers& p) { const OwnedRoute maps(load, p); });
  EXPECT_EQ(later[0], "ep_prepare: rank 0 gave this group up in exchange 2; make a new group");
  EXPECT_EQ(later[1], "ep_prepare: all ranks must call the same ops in the same order, but in exchange 2 rank 0 is in "
                      "ep_dispatch and rank 1 in ep_prepare");
}

TEST(Ep, ABadIndexFailsEveryRank) {
  RankLoad good = {4, 1, {0, 3, 3}, {1, 1, 1}, Array(DType::f32, {3, 4}), Array(DType::f32, {3, 4})}, bad = good;
  bad.topk_idx[1] = 4;
  const ThreadRanks ranks(2, 1 << 20, 30);
  const auto errors = ranks.run([&](int r, const Peers& p) { const OwnedRoute maps(r ? bad : good, p); });
  EXPECT_EQ(errors[0], "ep_prepare: rank 0 waits for rank 1, which gave up in exchange 1");
  EXPECT_NE(errors[1].find("topk_idx[1, 0] (token 1) must be in [-1, E=4), got 4"), std::string::npos) << errors[1];
}

TEST(Ep, WhatFindsNoRoomIsDroppedOnEveryRank) {
  RankLoad load = {2, 1, std::vector<int32_t>(30, 1), std::vector<float>(30, 1.0f), Array(DType::f32, {30, 4}), Array(DType::f32, {30, 4})};
  load.x.fill(1.0);
  const ThreadRanks ranks(2, 1 << 20);
  expect_no_errors(ranks.run([&](int r, const Peers& p) {
    const int64_t capacity = r == 0 ? 5 : 40;
    const OwnedRoute maps(load, p, 0, 1, capacity);
    EXPECT_EQ(maps.offsets.back(), r == 0 ? 0 : 40);
    const Array rows(DType::f32, {capacity, 4}), out(DType::f32, {30, 4});
    const Tensor y = DataArea(p).rows(rows);
    ep_dispatch(load.x.view(), nullptr, maps.route(), p, y, nullptr, {});
    ep_combine(y, maps.route(), p, nullptr, out.view(), {});
    for (int64_t i = 0; i < out.count(); ++i) ASSERT_EQ(out[i], r == 0 || i / 4 < 10 ? 1.0 : 0.0) << i / 4;
  }));
}

TEST(Ep, NamesBadArguments) {
  const ThreadRanks ranks(1, 1 << 20);
  const Peers p = ranks.peers(0);
  const RankLoad load = {3, 2, {0, 1, 2, 2}, {1, 1, 1, 1}, Array(DType::f32, {2, 4}), Array(DType::f32, {2, 4})};
  OwnedRoute maps(load, p);
  DataArea area(p);
  const Array elsewhere(DType::f32, {4, 4});
  const Tensor out = area.rows(elsewhere), narrow_out = area.rows(Array(DType::f32, {4, 3}));
  const auto dispatch = [&](const Tensor& to) { ep_dispatch(load.x.view(), nullptr, maps.route(), p, to, nullptr, {}); };
  expect_error([&] { dispatch(narrow_out); }, "ep_dispatch: out must be float32 [R, H=4], got float32 [4, 3] on cpu");
  expect_error([&] { dispatch(elsewhere.view()); }, "ep_dispatch: out must lie in the memory that rank 0 shares with its peers");
  dispatch(out);
  maps.dest[3] = 4;
  expect_error([&] { dispatch(out); }, "ep_dispatch: dest[0, 1] must be a rank and a row of it, or (-1, -1), got (0, 4)");
  Peers two = p;
  two.world = 2;
  expect_error([&] { const OwnedRoute m(load, two); }, "ep_prepare: the number of experts must be a positive multiple of the 2 ranks, got 3");
}

// A piece that others may still be reading is not handed out again.
TEST(SharedHeap, PiecesRestUntilNobodyReadsThem) {
  constexpr int64_t page = cpu::SharedHeap::align;
  cpu::SharedHeap heap(8 * page, false);
  EXPECT_EQ(heap.take(3 * page - 5, 1), 0);
  EXPECT_EQ(heap.take(1, 1), 3 * page);
  EXPECT_EQ(heap.take(0, 1), 4 * page);
  EXPECT_EQ(heap.take(4 * page, 1), -1);
  heap.give_back(0, 1);
  EXPECT_EQ(heap.take(2 * page, 2), 5 * page) << "exchange 1 may not be over for others";
  EXPECT_EQ(heap.take(2 * page, 2), -1);
  EXPECT_EQ(heap.take(2 * page, 3), 0);
  EXPECT_EQ(heap.in_use(), 6 * page);
  EXPECT_EQ(heap.reached(), 7 * page);
  heap.give_back(3 * page, 3);
  heap.give_back(4 * page, 3);
  heap.give_back(0, 4);
  EXPECT_EQ(heap.take(3 * page, 5), 2 * page) << "the smallest that fits, joined of free neighbours";
  heap.give_back(5 * page, 5);
  heap.give_back(2 * page, 5);
  EXPECT_EQ(heap.take(8 * page, 7), 0);
  cpu::SharedHeap alone(page, true);
  EXPECT_EQ(alone.take(page, 1), 0);
  alone.give_back(0, 1);
  EXPECT_EQ(alone.take(page, 1), 0);
}

}  // namespace
}  // namespace xt::test
