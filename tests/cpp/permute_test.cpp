#include "xtuner/ops/permute.h"

#include "helpers.h"

namespace xt::test {
namespace {

void check(DType dtype, int64_t t, int64_t k, int64_t h, Rng& rng) {
  const Array x = Array(dtype, {t, h}).randomise(rng);
  std::vector<int32_t> src;
  for (int64_t i = 0; i < t * k; ++i) src.push_back(rng() % 5 == 0 ? -1 : static_cast<int32_t>(i));
  src.insert(src.end(), 3, -1);
  std::shuffle(src.begin(), src.end(), rng);
  const int64_t r = static_cast<int64_t>(src.size());
  const auto run = [&](int threads, Array& out) { permute(x.view(), view(src, {r}), k, out.view(), {nullptr, threads}); };
  Array out(dtype, {r, h});
  run(1, out);
  for (int64_t i = 0; i < r * h; ++i) {
    const int64_t from = src[i / h];
    ASSERT_EQ(out[i], from < 0 ? 0.0 : x[from / k * h + i % h]) << "row " << i / h << " of T=" << t << " K=" << k;
  }
  expect_same_bits(Array(dtype, {r, h}), run);
}

TEST(Permute, CopiesRowsAndZeroesTheRest) {
  Rng rng(1);
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (int64_t h : odd_sizes) check(dtype, pick(rng, {0, 1, 17, 300}), pick(rng, {1, 2, 8}), h, rng);
    check(dtype, 5, 0, 16, rng);
    check(dtype, 5, 2, 0, rng);
  }
}

TEST(Permute, SpecialValuesPassBitByBit) {
  std::vector<uint32_t> bits = {0x7f800001u, 0xffc12345u, 0x80000000u, 0x7f800000u, 1u, 0xff800000u};
  std::vector<uint32_t> out(6);
  const std::vector<int32_t> src = {0};
  permute(Tensor(bits.data(), DType::f32, {1, 6}), view(src, {1}), 1, Tensor(out.data(), DType::f32, {1, 6}), {});
  EXPECT_EQ(out, bits);
}

TEST(Permute, NamesBadArguments) {
  Array x(DType::f32, {3, 4}), out(DType::f32, {2, 4}), bf(DType::bf16, {2, 4}), narrow_out(DType::f32, {2, 3});
  const std::vector<int32_t> src = {0, 5};
  const std::vector<int64_t> long_src = {0, 5};
  const auto call = [&](const Tensor& a, const Tensor& s, int64_t k, const Tensor& o) {
    return [=] { permute(a, s, k, o, {}); };
  };
  const Tensor s = view(src, {2});
  expect_error(call(x.view(), s, 1, out.view()), "permute: src[1] must be in [-1, T*K=3), got 5");
  expect_error(call(x.view(), s, -1, out.view()), "num_experts_per_tok must not be negative, got -1");
  expect_error(call(x.view(), view(long_src, {2}), 2, out.view()), "src must be int32 [R], got int64 [2] on cpu");
  expect_error(call(x.view(), s, 2, bf.view()), "out must be float32 [R=2, H=4], got bfloat16 [2, 4] on cpu");
  expect_error(call(x.view(), s, 2, narrow_out.view()), "out must be float32 [R=2, H=4], got float32 [2, 3] on cpu");
  Tensor turned = x.view();
  turned.strides[0] = 1, turned.strides[1] = 3;
  expect_error(call(turned, s, 2, out.view()), "x must be contiguous, got float32 [3, 4] on cpu, strides (1, 3)");
  Tensor elsewhere = out.view();
  elsewhere.device = {DeviceType::cuda, 1};
  expect_error(call(x.view(), s, 2, elsewhere), "out must be on cpu like the arguments before it");
  Tensor hollow = x.view();
  hollow.data = nullptr;
  expect_error(call(hollow, s, 2, out.view()), "x has no memory behind it");
  Tensor all[3] = {x.view(), s, out.view()};
  for (Tensor& t : all) t.device = {DeviceType::cuda, 1};
  expect_error(call(all[0], all[1], 2, all[2]), "permute: this build has no kernel for cuda:1");
}

}  // namespace
}  // namespace xt::test
