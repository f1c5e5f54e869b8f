// Ranks of an expert-parallel group for tests: random loads, one step through the ep ops, and the same step on one rank
// that holds all experts.
#pragma once
#include "helpers.h"
#include "xtuner/ops/ep_combine.h"
#include "xtuner/ops/ep_dispatch.h"
#include "xtuner/ops/permute.h"
#include "xtuner/ops/route_map.h"
#include "xtuner/ops/unpermute.h"

namespace xt::test {

// What one rank brings to a step.
struct RankLoad {
  int64_t experts, k;
  std::vector<int32_t> topk_idx;  // [T, K]
  std::vector<float> probs;       // [T, K]
  Array x, dout;                  // [T, H]

  int64_t tokens() const { return static_cast<int64_t>(probs.size()) / k; }
  int64_t hidden() const { return x.view().shape[1]; }
};

// Loads of all ranks. Some ranks have no tokens; experts are chosen evenly, or all on one rank, or on few, or not at all.
inline std::vector<RankLoad> random_loads(Rng& rng, int world, DType dtype, int64_t hidden) {
  const int64_t here = pick(rng, {1, 2, 5}), experts = here * world, k = pick(rng, {1, 2, 3, 8});
  const int64_t kind = rng() % 5, hot = rng() % world;
  std::vector<RankLoad> loads;
  for (int rank = 0; rank < world; ++rank) {
    const int64_t tokens = pick(rng, {0, 1, 7, 60, 129});
    std::vector<int32_t> idx;
    std::vector<float> probs;
    for (int64_t i = 0; i < tokens * k; ++i) {
      int64_t e = static_cast<int64_t>(rng() % experts);
      if (kind == 1) e = hot * here + static_cast<int64_t>(rng() % here);
      if (kind == 2) e = std::min<int64_t>(e, static_cast<int64_t>(rng() % experts)) / 2;
      if (kind == 3 || rng() % 8 == 0) e = -1;
      idx.push_back(static_cast<int32_t>(e));
      probs.push_back(static_cast<float>(rng() % 1000) / 500 - 1);
    }
    loads.push_back({experts, k, idx, probs, Array(dtype, {tokens, hidden}).randomise(rng),
                     Array(dtype, {tokens, hidden}).randomise(rng)});
  }
  return loads;
}

// What the step leaves on a rank: the result for its tokens, and the gradients of its tokens and weights.
struct StepResult {
  std::vector<unsigned char> out, dx;
  std::vector<float> dprobs;
  bool operator==(const StepResult& o) const { return out == o.out && dx == o.dx && dprobs == o.dprobs; }
};

// The experts of the test: expert e multiplies its rows. (Its gradient does too.)
inline void multiply_rows(Array& rows, const std::vector<int64_t>& offsets, int64_t first_expert) {
  const int64_t hidden = rows.view().shape[1];
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const double factor = 0.25 + 0.37 * static_cast<double>(first_expert + static_cast<int64_t>(e));
    for (int64_t i = offsets[e] * hidden; i < offsets[e + 1] * hidden; ++i) rows.set(i, rows[i] * factor);
  }
}

inline StepResult local_step(const RankLoad& load) {
  const int64_t t = load.tokens(), k = load.k, h = load.hidden(), rows = t * k;
  const DType dtype = load.x.view().dtype;
  std::vector<int32_t> counts(load.experts), row_of(rows), src(rows);
  std::vector<int64_t> offsets(load.experts + 1);
  const Tensor row_of_t = view(row_of, {t, k}), src_t = view(src, {rows}), probs = view(load.probs, {t, k});
  route_map(view(load.topk_idx, {t, k}), 1, view(counts, {load.experts}), view(offsets, {load.experts + 1}), row_of_t,
            src_t, {});
  Array y(dtype, {rows, h}), out(dtype, {t, h}), dy(dtype, {rows, h}), dx(dtype, {t, h});
  permute(load.x.view(), row_of_t, src_t, y.view(), {});
  multiply_rows(y, offsets, 0);
  unpermute(y.view(), row_of_t, &probs, out.view(), {});
  StepResult result;
  result.dprobs.resize(rows);
  const Tensor y_t = y.view(), dprobs = view(result.dprobs, {t, k});
  unpermute_bwd(load.dout.view(), &y_t, src_t, row_of_t, &probs, dy.view(), &dprobs, {});
  multiply_rows(dy, offsets, 0);
  unpermute(dy.view(), row_of_t, nullptr, dx.view(), {});
  result.out = out.bytes();
  result.dx = dx.bytes();
  return result;
}

// Hands out this rank's data area from its begin on. What an earlier one handed out is free again after two exchanges.
class DataArea {
 public:
  explicit DataArea(const Peers& peers) : at_(peers.data(peers.rank)), end_(at_ + peers.data_bytes) {}

  // Rows like those of `like`, filled with NaN, and where the ops find them.
  Tensor rows(const Array& like) {
    Tensor t = like.view();
    const int64_t bytes = like.count() * size_of(t.dtype);
    t.data = at_;
    std::memset(at_, 0xff, static_cast<size_t>(bytes));
    at_ += (bytes + 63) / 64 * 64;
    if (at_ > end_) fail("the data area of this test is too small");
    return t;
  }

 private:
  char *at_, *end_;
};

inline void copy(const Tensor& from, const Tensor& to) {
  const int64_t bytes = from.numel() * size_of(from.dtype);
  if (bytes) std::memcpy(to.data, from.data, static_cast<size_t>(bytes));
}

// The maps of one rank, owned.
struct OwnedRoute {
  int64_t tokens, k, world, experts, rows = 0;
  std::vector<int32_t> counts, dest;
  std::vector<int64_t> offsets;

  // Room for the maps, which are still to be made.
  OwnedRoute(const RankLoad& load, int world)
      : tokens(load.tokens()), k(load.k), world(world), experts(load.experts), counts(world * experts, -7),
        dest(tokens * k * 2, -7), offsets(experts / world + 1, -7) {}

  OwnedRoute(const RankLoad& load, const Peers& peers, int64_t spare_rows = 0, int threads = 1, int64_t capacity = -1)
      : OwnedRoute(load, peers.world) {
    const EpRoute r = route();
    ep_prepare(view(load.topk_idx, {tokens, k}), capacity, peers, r.counts, r.dest, view(offsets, {experts / world + 1}),
               {nullptr, threads});
    rows = offsets.back() + spare_rows;
  }

  EpRoute route() const { return {view(counts, {world, experts}), view(dest, {tokens, k, 2})}; }
};

inline StepResult ep_step(const RankLoad& load, const Peers& peers, int threads = 1, int64_t spare_rows = 0) {
  const int64_t t = load.tokens(), k = load.k, h = load.hidden(), first_expert = load.experts / peers.world * peers.rank;
  const DType dtype = load.x.view().dtype;
  const Stream stream{nullptr, threads};
  const OwnedRoute maps(load, peers, spare_rows, threads);
  const EpRoute route = maps.route();
  const Tensor probs = view(load.probs, {t, k});
  Array rows(dtype, {maps.rows, h}), out(dtype, {t, h}), dx(dtype, {t, h});
  DataArea area(peers);
  const Tensor y = area.rows(rows), dy = area.rows(rows);
  const auto experts = [&](const Tensor& at) {
    copy(at, rows.view());
    multiply_rows(rows, maps.offsets, first_expert);
    copy(rows.view(), at);
  };
  ep_dispatch(load.x.view(), nullptr, route, peers, y, nullptr, stream);
  experts(y);
  ep_combine(y, route, peers, &probs, out.view(), stream);
  StepResult result;
  result.dprobs.resize(t * k);
  ep_combine_bwd(load.dout.view(), y, route, peers, probs, dy, view(result.dprobs, {t, k}), stream);
  experts(dy);
  ep_combine(dy, route, peers, nullptr, dx.view(), stream);
  result.out = out.bytes();
  result.dx = dx.bytes();
  return result;
}

}  // namespace xt::test
