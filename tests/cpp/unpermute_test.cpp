#include "xtuner/ops/unpermute.h"

#include "cpu/cache.h"
#include "cpu/kernels.h"
#include "helpers.h"
#include "routing.h"

namespace xt::test {
namespace {

void check_forward(const RandomRouting& m, DType dtype, int64_t h, bool weighted, Rng& rng) {
  const Array y = m.rows(dtype, h, rng);
  const Tensor probs = m.probs_view();
  const auto run = [&](int threads, Array& out) {
    unpermute(y.view(), m.row_of_view(), weighted ? &probs : nullptr, out.view(), {nullptr, threads});
  };
  Array out(dtype, {m.t, h});
  run(1, out);
  for (int64_t i = 0; i < m.t * h; ++i) {
    double sum = 0, size = 0;
    for (int64_t k = 0; k < m.k; ++k) {
      const int64_t choice = i / h * m.k + k, row = m.row_of[choice];
      if (row < 0) continue;
      const double term = (weighted ? m.probs[choice] : 1.0) * y[row * h + i % h];
      sum += term;
      size += std::fabs(term);
    }
    ASSERT_NEAR(out[i], sum, size * m.k * 1.2e-7 + out.rounding(sum)) << "token " << i / h << " H=" << h;
  }
  expect_same_bits(Array(dtype, {m.t, h}), run);
}

void check_backward(const RandomRouting& m, DType dtype, int64_t h, bool weighted, bool want_dprobs, Rng& rng) {
  const Array y = m.rows(dtype, h, rng), dout = Array(dtype, {m.t, h}).randomise(rng);
  const Tensor probs = m.probs_view(), ty = y.view();
  std::vector<float> first;
  const auto run = [&](int threads, Array& dy) {
    std::vector<float> dprobs(m.t * m.k, NAN);
    const Tensor tdp = view(dprobs, {m.t, m.k});
    unpermute_bwd(dout.view(), want_dprobs ? &ty : nullptr, m.src_view(), m.row_of_view(),
                  weighted ? &probs : nullptr, dy.view(), want_dprobs ? &tdp : nullptr, {nullptr, threads});
    if (!want_dprobs) return;
    if (threads == 1) first = dprobs;
    EXPECT_EQ(dprobs, first) << threads << " threads";
  };
  Array dy(dtype, {m.r, h});
  run(1, dy);
  for (int64_t i = 0; i < m.r * h; ++i) {
    const int64_t choice = m.src[i / h];
    const double wanted = choice < 0 ? 0.0 : (weighted ? m.probs[choice] : 1.0) * dout[choice / m.k * h + i % h];
    ASSERT_NEAR(dy[i], wanted, dy.rounding(wanted)) << "row " << i / h;
  }
  for (int64_t i = 0; want_dprobs && i < m.t * m.k; ++i) {
    double sum = 0, size = 0;
    for (int64_t j = 0; m.row_of[i] >= 0 && j < h; ++j) {
      const double term = dout[i / m.k * h + j] * y[m.row_of[i] * h + j];
      sum += term;
      size += std::fabs(term);
    }
    ASSERT_NEAR(first[i], sum, size * 1e-6) << "choice " << i;
  }
  expect_same_bits(Array(dtype, {m.r, h}), run);
}

// All 65536 numbers times a weight: products in the middle between two numbers, subnormal ones, overflow, NaN.
TEST(Unpermute, RoundsAllBfloat16ToNearestEven) {
  const std::vector<float> probs = {1.0f, 0.5f, 0.99609375f, 1.00390625f, 1.5f, -3.0e-5f, 0x1p-100f, 1.9e37f, 0.0f};
  const int64_t t = static_cast<int64_t>(probs.size()), h = 1 << 16;
  Array y(DType::bf16, {t, h});
  std::vector<int32_t> rows(t);
  for (int64_t i = 0; i < t; ++i) {
    rows[i] = static_cast<int32_t>(i);
    for (int64_t j = 0; j < h; ++j) y.view().ptr<bf16_t>()[i * h + j] = static_cast<bf16_t>(j);
  }
  const Tensor weights = view(probs, {t, 1}), row_of = view(rows, {t, 1}), src = view(rows, {t});
  for_each_isa([&] {
    Array out(DType::bf16, {t, h}), dy(DType::bf16, {t, h});
    unpermute(y.view(), row_of, &weights, out.view(), {});
    unpermute_bwd(y.view(), nullptr, src, row_of, &weights, dy.view(), nullptr, {});
    for (int64_t i = 0; i < t * h; ++i) {
      const float product = probs[i / h] * widen(static_cast<bf16_t>(i % h));
      const bf16_t sum = out.view().ptr<bf16_t>()[i], gradient = dy.view().ptr<bf16_t>()[i];
      if (std::isnan(product)) {
        ASSERT_TRUE(std::isnan(widen(sum)) && std::isnan(widen(gradient))) << "code " << i % h << " * " << probs[i / h];
        continue;
      }
      if (sum << 1 & 0xffff) {  // the sign of a sum that is zero depends on whether multiplication and addition are fused
        ASSERT_EQ(sum, narrow(product)) << "code " << i % h << " * " << probs[i / h];
      } else {
        ASSERT_EQ(narrow(product) << 1 & 0xffff, 0) << "code " << i % h << " * " << probs[i / h];
      }
      ASSERT_EQ(gradient, narrow(product)) << "code " << i % h << " * " << probs[i / h];
    }
  });
}

TEST(Unpermute, Fuzz) {
  Rng rng(1);
  for_each_isa([&] {
    fuzz(2, rng, [&](const FuzzCase& c) {
      const RandomRouting m(rng, c.sizes[0], c.sizes[0] > 200 ? 2 : pick(rng, {0, 1, 3, 8}), c.load);
      const bool weighted = rng() % 2;
      check_forward(m, c.dtype, c.sizes[1], weighted, rng);
      check_backward(m, c.dtype, c.sizes[1], weighted, rng() % 2, rng);
    });
  });
}

struct alignas(64) Line {
  unsigned char bytes[64];
};

// The kernels for large outputs, on small ones: rows of one, two and many cache lines.
TEST(Unpermute, StreamingGivesTheSameBits) {
  Rng rng(2);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t lines : {1, 2, 3, 7, 8, 48}) {
        const int64_t h = lines * 64 / size_of(dtype);
        const RandomRouting m(rng, 9, 3, Load::random);
        const Array y = m.rows(dtype, h, rng), dout = Array(dtype, {m.t, h}).randomise(rng);
        const auto run = [&](bool stream, bool weighted, bool want_dprobs) {
          std::vector<Line> out(m.t * lines), dy(m.r * lines);
          std::vector<float> dprobs(m.t * m.k);
          const cpu::UnpermuteRows a = {dtype, h, m.k, m.row_of.data(), weighted ? m.probs.data() : nullptr,
                                        y.view().data, out.data(), dout.view().data, dy.data(),
                                        want_dprobs ? dprobs.data() : nullptr, stream, stream};
          cpu::kernels().unpermute(a, 0, m.t);
          cpu::kernels().unpermute_bwd(a, 0, m.t);
          std::string bits(reinterpret_cast<const char*>(out.data()), out.size() * 64);
          bits.append(reinterpret_cast<const char*>(dy.data()), dy.size() * 64);
          return bits.append(reinterpret_cast<const char*>(dprobs.data()), dprobs.size() * 4);
        };
        for (bool weighted : {false, true}) {
          for (bool want_dprobs : {false, true}) {
            EXPECT_EQ(run(true, weighted, want_dprobs), run(false, weighted, want_dprobs)) << lines << " lines";
          }
        }
      }
    }
  });
}

TEST(Unpermute, StreamsLargeAlignedOutputsOnly) {
  static Line memory[2];
  const int64_t rows = cpu::last_level_cache() / 2 / 64;
  EXPECT_TRUE(cpu::worth_streaming(Tensor(memory, DType::f32, {rows, 16})));
  EXPECT_FALSE(cpu::worth_streaming(Tensor(memory, DType::f32, {rows - 1, 16})));
  EXPECT_FALSE(cpu::worth_streaming(Tensor(memory, DType::f32, {rows, 17})));
  EXPECT_FALSE(cpu::worth_streaming(Tensor(memory[0].bytes + 32, DType::f32, {rows, 16})));
}

TEST(Unpermute, NamesBadArguments) {
  Rng rng(3);
  RandomRouting m(rng, 4, 2, Load::one_hot);
  const Array y(DType::f32, {m.r, 8}), out(DType::f32, {4, 8});
  const auto forward = [&] { unpermute(y.view(), m.row_of_view(), nullptr, out.view(), {}); };
  const auto backward = [&](bool dprobs) {
    const Tensor dp = m.probs_view();
    unpermute_bwd(out.view(), nullptr, m.src_view(), m.row_of_view(), nullptr, y.view(), dprobs ? &dp : nullptr, {});
  };
  expect_error([&] { backward(true); }, "unpermute_bwd: dprobs needs y, got none");
  const std::vector<int32_t> good = m.row_of;
  m.row_of[3] = 12;
  expect_error(forward, "unpermute: row_of[1, 1] must be in [-1, R=12), got 12");
  m.row_of = good;
  m.row_of[0] = m.row_of[1] = 3;
  expect_error([&] { backward(false); }, "src and row_of must be each other's inverse, but row_of[0, ");
  const Tensor half = Tensor(y.view().data, DType::f32, {2, 4});
  expect_error([&] { unpermute(y.view(), view(good, {4, 2}), &half, out.view(), {}); },
               "probs must be float32 [T=4, K=2], got float32 [2, 4] on cpu");
}

}  // namespace
}  // namespace xt::test
