// Quantizing what is permuted or activated on the way has the bits of doing one after the other.
#include "quantize_fused_cases.h"

namespace xt::test {
namespace {

TEST(QuantizeFused, PermuteHasTheBitsOfThePair) {
  for_each_isa([] {
    Rng rng(1);
    for (int trial = 0; trial < 12; ++trial) {
      const FusedCase c(rng);
      const Maps maps(rng, pick(rng, {0, 1, 7, 129, 200}), 3);
      const Array x = Array(c.in, {maps.tokens, c.hidden}).randomise(rng);
      const Tensor offsets = view(maps.offsets, {maps.experts + 1});
      Array rows(c.in, {maps.rows, c.hidden});
      permute(x.view(), maps.row_of_view(), maps.src_view(), rows.view(), {});
      RowColArrays pair(c, maps.rows, maps.experts), ours = pair;
      quantize_rowcol(rows.view(), offsets, c.params, pair.q.view(), pair.scale.view(), pair.qt.view(), pair.scale_t.view(), {});
      for (int threads : {1, 2, 3, 8}) {
        permute_quantize_rowcol(x.view(), maps.src_view(), maps.k, offsets, c.params, ours.q.view(), ours.scale.view(),
                                ours.qt.view(), ours.scale_t.view(), {nullptr, threads});
        EXPECT_TRUE(ours.bytes() == pair.bytes()) << "trial " << trial << ", " << threads << " threads";
      }
    }
  });
}

TEST(QuantizeFused, SwigluHasTheBitsOfThePair) {
  for_each_isa([] {
    Rng rng(2);
    for (int trial = 0; trial < 12; ++trial) {
      const FusedCase c(rng);
      const auto loads = random_rows(rng, pick(rng, {1, 3}));
      const std::vector<int64_t> at = offsets_of(loads);
      const int64_t experts = static_cast<int64_t>(loads.size()), used = at.back(), rows = used + trial % 3;
      Array x = Array(c.in, {rows, 2 * c.hidden}).randomise(rng);
      for (int64_t i = used * 2 * c.hidden; i < x.count(); ++i) x.set(i, std::nan(""));
      const Tensor offsets = view(at, {experts + 1});
      SwigluParams params;
      if (trial % 2) params = {1.702, 7.0, 1.0};
      Array act(c.in, {rows, c.hidden});
      swiglu(x.view(), &offsets, params, act.view(), {});
      RowColArrays pair(c, rows, experts), ours = pair;
      quantize_rowcol(act.view(), offsets, c.params, pair.q.view(), pair.scale.view(), pair.qt.view(), pair.scale_t.view(), {});
      for (int threads : {1, 2, 3, 8}) {
        swiglu_quantize_rowcol(x.view(), offsets, params, c.params, ours.q.view(), ours.scale.view(), ours.qt.view(),
                               ours.scale_t.view(), {nullptr, threads});
        EXPECT_TRUE(ours.bytes() == pair.bytes()) << "trial " << trial << ", " << threads << " threads";
      }
    }
  });
}

TEST(QuantizeFused, NamesBadArguments) {
  Rng rng(3);
  const Array x = Array(DType::f32, {2, 128}).randomise(rng);
  const std::vector<int64_t> at = {0, 2};
  const std::vector<int32_t> src = {0, 2};
  FusedCase c(rng);
  c.hidden = 128;
  RowColArrays out(c, 2, 1);
  const auto run = [&](int64_t k) {
    permute_quantize_rowcol(x.view(), view(src, {2}), k, view(at, {2}), {}, out.q.view(), out.scale.view(), out.qt.view(),
                            out.scale_t.view(), {});
  };
  expect_error([&] { run(1); }, "permute_quantize_rowcol: src[1] must be in [-1, T*K=2), got 2");
  expect_error([&] { run(0); }, "permute_quantize_rowcol: num_experts_per_tok must be at least 1, got 0");
  expect_error(
      [&] {
        swiglu_quantize_rowcol(x.view(), view(at, {2}), {}, {}, out.q.view(), out.scale.view(), out.qt.view(),
                               out.scale_t.view(), {});
      },
      "swiglu_quantize_rowcol: H must be a multiple of 128");
}

}  // namespace
}  // namespace xt::test
