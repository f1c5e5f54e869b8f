// bfloat16 conversion of every instruction set, and the choice between them.
#include "helpers.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/unpermute.h"

namespace xt::test {
namespace {

uint32_t bits_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even, in integer arithmetic on the exact value's neighbours.
bf16_t nearest(float f) {
  if (std::isnan(f)) return static_cast<bf16_t>((bits_of(f) >> 16) | 0x40);
  const uint32_t bits = bits_of(f), down = bits >> 16, rest = bits & 0xffff;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (down & 1));
  return static_cast<bf16_t>(down + up);
}

TEST(Bf16, ScalarRoundTripOfAllCodes) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const bf16_t b = static_cast<bf16_t>(code);
    EXPECT_EQ(bits_of(widen(b)), code << 16);
    EXPECT_EQ(narrow(widen(b)), std::isnan(widen(b)) ? (b | 0x40) : b);
  }
}

// For every code: the value itself, just above, just below the tie, the tie, and just above the tie.
TEST(Bf16, RoundingOfAllISAsAroundAllCodes) {
  std::vector<float> values;
  for (uint32_t code = 0; code < 65536; ++code) {
    for (uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) values.push_back(float_of(code << 16 | low));
  }
  const int64_t n = static_cast<int64_t>(values.size());
  const std::vector<float> one = {1.0f};
  const std::vector<int64_t> at = {0, n};
  for (float f : values) ASSERT_EQ(narrow(f), nearest(f)) << std::hex << bits_of(f);
  for_each_isa([&] {
    std::vector<bf16_t> out(n);  // value x 1, written as bf16
    gemm_m_grouped(view(values, {n, 1}), view(one, {1, 1, 1}), view(at, {2}), false, Tensor(out.data(), DType::bf16, {n, 1}), {});
    for (int64_t i = 0; i < n; ++i) {
      const float exact = values[i] == 0 ? 0.0f : values[i];  // a sum that starts at +0 loses the sign of -0
      ASSERT_EQ(out[i], nearest(exact)) << std::hex << bits_of(values[i]);
    }
  });
}

// The same through pairs, whole vectors and parts of one: rows of 1 x value.
TEST(Bf16, RoundingOfRows) {
  std::vector<float> values;
  for (uint32_t code = 0; code < 65536; code += 5) {
    for (uint32_t low : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) values.push_back(float_of(code << 16 | low));
  }
  const int64_t n = static_cast<int64_t>(values.size()), h = 121;
  std::vector<int32_t> map(n);
  std::iota(map.begin(), map.end(), 0);
  const std::vector<bf16_t> ones(n * h, narrow(1.0f));
  const Tensor dout(ones.data(), DType::bf16, {n, h}), probs = view(values, {n, 1});
  for_each_isa([&] {
    std::vector<bf16_t> dy(n * h);
    unpermute_bwd(dout, nullptr, view(map, {n}), view(map, {n, 1}), &probs, Tensor(dy.data(), DType::bf16, {n, h}),
                  nullptr, {});
    for (int64_t i = 0; i < n * h; ++i) {
      if (dy[i] != nearest(values[i / h])) ADD_FAILURE() << std::hex << bits_of(values[i / h]) << " column " << i % h;
    }
  });
}

// All codes through the vector loads and stores of unpermute (one expert, weight 1).
TEST(Bf16, VectorRoundTripOfAllCodes) {
  std::vector<bf16_t> in(65536), out(65536);
  for (int64_t i = 0; i < 65536; ++i) in[i] = static_cast<bf16_t>(i);
  const std::vector<int32_t> row_of = {0};
  for_each_isa([&] {
    unpermute(Tensor(in.data(), DType::bf16, {1, 65536}), view(row_of, {1, 1}), nullptr,
              Tensor(out.data(), DType::bf16, {1, 65536}), {});
    for (int64_t i = 0; i < 65536; ++i) {
      const bf16_t wanted = std::isnan(widen(in[i])) ? (in[i] | 0x40) : in[i] == 0x8000 ? 0 : in[i];
      ASSERT_EQ(out[i], wanted) << "code " << i;
    }
  });
}

TEST(Isa, ForcedAndBack) {
  const BuildInfo best = build_info();
  ASSERT_EQ(best.isas.front(), "portable");
  EXPECT_EQ(best.isa, best.isas.back());
  EXPECT_TRUE(best.cpu);
  force_isa("portable");
  EXPECT_EQ(build_info().isa, "portable");
  force_isa("");
  EXPECT_EQ(build_info().isa, best.isa);
  expect_error([] { force_isa("mmx"); }, "force_isa: name must be one of portable");
}

}  // namespace
}  // namespace xt::test
