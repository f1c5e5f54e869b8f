#include "xtuner/ops/permute.h"

#include "helpers.h"
#include "routing.h"

namespace xt::test {
namespace {

void check(const RandomRouting& m, DType dtype, int64_t h, Rng& rng) {
  const Array x = Array(dtype, {m.t, h}).randomise(rng);
  const auto run = [&](int threads, Array& out) {
    permute(x.view(), m.row_of_view(), m.src_view(), out.view(), {nullptr, threads});
  };
  Array out(dtype, {m.r, h});
  run(1, out);
  for (int64_t i = 0; i < m.r * h; ++i) {
    const int64_t from = m.src[i / h];
    ASSERT_EQ(out[i], from < 0 ? 0.0 : x[from / m.k * h + i % h]) << "row " << i / h;
  }
  expect_same_bits(Array(dtype, {m.r, h}), run);
}

TEST(Permute, Fuzz) {
  Rng rng(1);
  for_each_isa([&] {
    fuzz(2, rng, [&](const FuzzCase& c) {
      const RandomRouting m(rng, c.sizes[0], pick(rng, {0, 1, 2, 8}), c.load);
      check(m, c.dtype, c.sizes[1], rng);
    });
  });
}

TEST(Permute, SpecialValuesPassBitByBit) {
  std::vector<uint32_t> bits = {0x7f800001u, 0xffc12345u, 0x80000000u, 0x7f800000u, 1u, 0xff800000u};
  std::vector<uint32_t> out(6);
  const std::vector<int32_t> map = {0};
  permute(Tensor(bits.data(), DType::f32, {1, 6}), view(map, {1, 1}), view(map, {1}),
          Tensor(out.data(), DType::f32, {1, 6}), {});
  EXPECT_EQ(out, bits);
}

TEST(Permute, NamesBadArguments) {
  Array x(DType::f32, {3, 4}), out(DType::f32, {2, 4}), bf(DType::bf16, {2, 4}), narrow_out(DType::f32, {2, 3});
  const std::vector<int32_t> row_of = {0, -1, 1}, src = {0, 2};
  const std::vector<int64_t> long_src = {0, 2};
  const auto call = [&](const Tensor& a, const Tensor& r, const Tensor& s, const Tensor& o) {
    return [=] { permute(a, r, s, o, {}); };
  };
  const Tensor r = view(row_of, {3, 1}), s = view(src, {2});
  call(x.view(), r, s, out.view())();
  expect_error(call(x.view(), view(row_of, {1, 3}), s, out.view()),
               "permute: row_of must be int32 [T=3, K], got int32 [1, 3] on cpu");
  expect_error(call(x.view(), r, view(long_src, {2}), out.view()), "src must be int32 [R], got int64 [2] on cpu");
  expect_error(call(x.view(), r, s, bf.view()), "out must be float32 [R=2, H=4], got bfloat16 [2, 4] on cpu");
  expect_error(call(x.view(), r, s, narrow_out.view()), "out must be float32 [R=2, H=4], got float32 [2, 3] on cpu");
  Tensor turned = x.view();
  turned.strides[0] = 1, turned.strides[1] = 3;
  expect_error(call(turned, r, s, out.view()), "x must be contiguous, got float32 [3, 4] on cpu, strides (1, 3)");
  Tensor elsewhere = out.view();
  elsewhere.device = {DeviceType::cuda, 1};
  expect_error(call(x.view(), r, s, elsewhere), "out must be on cpu like the arguments before it");
  Tensor hollow = x.view();
  hollow.data = nullptr;
  expect_error(call(hollow, r, s, out.view()), "x has no memory behind it");
  Tensor all[4] = {x.view(), r, s, out.view()};
  for (Tensor& t : all) t.device = {DeviceType::ascend, 1};
  expect_error(call(all[0], all[1], all[2], all[3]), "permute: this version has no kernel for npu:1");
  // No machine has that many GPUs.
  for (Tensor& t : all) t.device = {DeviceType::cuda, 1000};
  expect_error(call(all[0], all[1], all[2], all[3]),
               build_info().cuda ? "permute: CUDA error: "
                                 : "permute: got tensors on cuda:1000, but this build has no CUDA kernels: install xtuner "
                                   "again from source with XT_CUDA=ON and nvcc on PATH");
}

// The maps are checked before anything is written through them, and the first bad entry is named.
TEST(Permute, NamesMapsThatDisagree) {
  Array x(DType::f32, {3, 4}), out(DType::f32, {2, 4});
  const auto call = [&](std::vector<int32_t> row_of, std::vector<int32_t> src) {
    return [&, row_of, src] { permute(x.view(), view(row_of, {3, 1}), view(src, {2}), out.view(), {nullptr, 2}); };
  };
  expect_error(call({0, 2, 1}, {0, 2}), "permute: row_of[1, 0] must be in [-1, R=2), got 2");
  expect_error(call({0, -2, 1}, {0, 2}), "permute: row_of[1, 0] must be in [-1, R=2), got -2");
  const std::string inverse = "permute: src and row_of must be each other's inverse, but ";
  expect_error(call({0, 1, 1}, {0, 2}), inverse + "row_of[1, 0]=1 and src[1]=2");
  expect_error(call({0, -1, -1}, {0, 2}), inverse + "src[1]=2 and row_of[2, 0]=-1");
  expect_error(call({0, -1, -1}, {0, 3}), "permute: src[1] must be in [-1, T*K=3), got 3");
}

}  // namespace
}  // namespace xt::test
