#include "xtuner/ops/gemm_m_grouped_dswiglu.h"

#include <optional>

#include "helpers.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::test {
namespace {

struct Inputs {
  DType dtype;
  int64_t d, width;         // D, I
  std::vector<int64_t> at;  // offsets
  int64_t used, rows;
  Array dy, b, x, weights;  // NaN in the rows that nobody may read
  SwigluParams params;

  Inputs(DType dtype, int64_t d, int64_t width, const std::vector<int64_t>& expert_rows, int64_t unused, Rng& rng)
      : dtype(dtype),
        d(d),
        width(width),
        at(offsets_of(expert_rows)),
        used(at.back()),
        rows(used + unused),
        dy(dtype, {rows, d}),
        b(dtype, {static_cast<int64_t>(expert_rows.size()), d, width}),
        x(dtype, {rows, 2 * width}),
        weights(DType::f32, {rows}),
        params{1.702, rng() % 2 ? std::optional<double>(1.0) : std::nullopt, 0.5} {
    dy.randomise(rng, used * d);
    b.randomise(rng);
    x.randomise(rng, used * 2 * width);
    weights.randomise(rng, used);
  }
  Tensor offsets() const { return view(at, {static_cast<int64_t>(at.size())}); }
};

struct Outputs {
  Array dx, act, dweights;

  Outputs(const Inputs& in, bool weighted, int threads)
      : dx(in.dtype, {in.rows, 2 * in.width}), act(in.dtype, {in.rows, in.width}), dweights(DType::f32, {in.rows}) {
    const Array space(DType::f32, {gemm_m_grouped_dswiglu_workspace_size(in.x.view())});
    const Tensor w = in.weights.view(), dw = dweights.view(), s = space.view();
    DswigluOptions options = {in.params};
    if (weighted) options = {in.params, &w, &dw, &s};
    gemm_m_grouped_dswiglu(in.dy.view(), in.b.view(), in.offsets(), in.x.view(), dx.view(), act.view(),
                           {nullptr, threads}, options);
  }
  bool operator==(const Outputs& o) const {
    return dx.bytes() == o.dx.bytes() && act.bytes() == o.act.bytes() && dweights.bytes() == o.dweights.bytes();
  }
};

// The three steps that the op replaces; without weights it has their bits.
struct Steps {
  Array g, dx, act;

  explicit Steps(const Inputs& in)
      : g(in.dtype, {in.rows, in.width}), dx(in.dtype, {in.rows, 2 * in.width}), act(in.dtype, {in.rows, in.width}) {
    const Tensor offsets = in.offsets();
    gemm_m_grouped(in.dy.view(), in.b.view(), offsets, false, g.view(), {nullptr, 2});
    swiglu_bwd(g.view(), in.x.view(), &offsets, in.params, dx.view(), {nullptr, 2});
    swiglu(in.x.view(), &offsets, in.params, act.view(), {nullptr, 2});
  }
};

void expect_bits_of_steps(const Inputs& in, const Steps& steps) {
  const Outputs out(in, false, 2);
  EXPECT_EQ(out.dx.bytes(), steps.dx.bytes());
  EXPECT_EQ(out.act.bytes(), steps.act.bytes());
  for (int threads : {1, 3, 8}) EXPECT_TRUE(out == Outputs(in, false, threads)) << threads << " threads";
}

void expect_weighted(const Inputs& in, const Steps& steps) {
  const Outputs out(in, true, 2);
  for (int threads : {1, 3, 8}) EXPECT_TRUE(out == Outputs(in, true, threads)) << threads << " threads";
  const double alpha = in.params.alpha, limit = in.params.limit.value_or(HUGE_VAL), offset = in.params.up_offset;
  for (int64_t r = 0; r < in.rows; ++r) {
    double dot = 0, size = 0;
    for (int64_t i = 0; i < in.width; ++i) {
      const int64_t at_gate = r * 2 * in.width + i, at_up = at_gate + in.width, at_act = r * in.width + i;
      double gate = 0, up = 0, act = 0;
      if (r < in.used) {
        const double w = in.weights[r], g = steps.g[at_act], raw_gate = in.x[at_gate], raw_up = in.x[at_up];
        const double cut_gate = std::min(raw_gate, limit), cut_up = std::clamp(raw_up, -limit, limit) + offset;
        const double s = 1 / (1 + std::exp(-alpha * cut_gate));
        act = cut_gate * s * cut_up;
        gate = raw_gate > limit ? 0 : w * g * cut_up * (s + alpha * cut_gate * s * (1 - s));
        up = std::fabs(raw_up) > limit ? 0 : w * g * cut_gate * s;
        dot += g * act;
        size += std::fabs(g * act);
        act *= w;
      }
      const double scale = r < in.used ? std::fabs(in.weights[r] * steps.g[at_act]) : 0;
      ASSERT_NEAR(out.dx[at_gate], gate, 4e-6 * (std::fabs(gate) + scale) + out.dx.rounding(gate)) << r << ", " << i;
      ASSERT_NEAR(out.dx[at_up], up, 4e-6 * std::fabs(up) + out.dx.rounding(up)) << r << ", " << i;
      ASSERT_NEAR(out.act[at_act], act, 4e-6 * std::fabs(act) + out.act.rounding(act)) << r << ", " << i;
    }
    ASSERT_NEAR(out.dweights[r], dot, size * (4e-6 + 2 * std::sqrt(in.width) * 6e-8)) << r;
  }
}

TEST(GemmMGroupedDswiglu, Fuzz) {
  Rng rng(21);
  for_each_isa([&] {
    fuzz(3, rng, [&](const FuzzCase& c) {
      const int64_t d = std::max<int64_t>(c.sizes[1], 1), width = c.sizes[2];
      const int64_t experts = width * d > 20000 ? pick(rng, {1, 2, 3}) : pick(rng, {1, 8, 129});
      const Inputs in(c.dtype, d, width, rows_of_load(rng, c.load, experts, c.sizes[0]), pick(rng, {0, 1, 129}), rng);
      const Steps steps(in);
      expect_bits_of_steps(in, steps);
      expect_weighted(in, steps);
    });
  });
}

TEST(GemmMGroupedDswiglu, SeveralTilesAndPassesOverK) {
  Rng rng(22);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      const Inputs in(dtype, 1100, 300, {3, 0, 130}, 2, rng);
      const Steps steps(in);
      expect_bits_of_steps(in, steps);
      expect_weighted(in, steps);
    }
  });
}

TEST(GemmMGroupedDswiglu, NamesBadArguments) {
  Rng rng(23);
  Inputs in(DType::f32, 4, 3, {3, 5}, 0, rng);
  const Array dx(DType::f32, {8, 6}), act(DType::f32, {8, 3}), dw(DType::f32, {8}), short_space(DType::f32, {1});
  const Tensor w = in.weights.view(), dwv = dw.view(), s = short_space.view();
  const auto call = [&](const Tensor& dy, const Tensor& b, const Tensor& x, const DswigluOptions& options = {}) {
    return [&, dy, b, x, options] {
      gemm_m_grouped_dswiglu(dy, b, in.offsets(), x, dx.view(), act.view(), {}, options);
    };
  };
  const Tensor dy = in.dy.view(), b = in.b.view(), x = in.x.view();
  const Array none(DType::f32, {8, 0}), turned(DType::f32, {2, 3, 4});
  expect_error(call(none.view(), b, x), "gemm_m_grouped_dswiglu: D must be positive, got 0");
  expect_error(call(dy, turned.view(), x), "b must be float32 [E=2, D=4, I], got float32 [2, 3, 4]");
  expect_error(call(dy, b, act.view()), "x must be float32 [R=8, 2I=6], got float32 [8, 3]");
  expect_error(call(dy, b, x, {{}, &w, &dwv}), "weights, dweights and workspace come together or not at all");
  expect_error(call(dy, b, x, {{}, &w, &dwv, &s}), "workspace must be float32 [size=8], got float32 [1]");
  expect_error(call(dy, b, x, {{1, -2.0}}), "limit must be positive, got -2");
  in.at = {0, 5, 9};
  expect_error(call(dy, b, x), "offsets[2]=9 exceeds the 8 rows there are");
}

}  // namespace
}  // namespace xt::test
