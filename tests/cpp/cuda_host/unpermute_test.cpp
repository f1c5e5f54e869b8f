#include "xtuner/ops/unpermute.h"

#include <sys/mman.h>

#include "device.h"
#include "routing.h"

namespace xt::test {
namespace {

// Same bits where the CPU fuses multiply-adds as the GPU does; else each of the K steps may round apart.
void expect_sums(const Array& got, const Array& cpu, int64_t k) {
  if (cpu_fuses()) {
    EXPECT_EQ(got.bytes(), cpu.bytes());
    return;
  }
  for (int64_t i = 0; i < got.count(); ++i) ASSERT_NEAR(got[i], cpu[i], k * 4e-6 + got.rounding(cpu[i])) << i;
}

void compare_forward(const RandomRouting& c, int64_t h, DType dtype, bool weighted, Rng& rng) {
  const Array y = c.rows(dtype, h, rng);
  const Tensor probs = c.probs_view(), row_of = c.row_of_view();
  Array out(dtype, {c.t, h}), cpu = out;
  OnMachine d;
  const Tensor on_device = d.in("probs", probs);
  unpermute(d.in("y", y.view()), d.in("row_of", row_of), weighted ? &on_device : nullptr, d.out("out", out.view()),
            d.stream());
  unpermute(y.view(), row_of, weighted ? &probs : nullptr, cpu.view(), {});
  expect_sums(out, cpu, c.k);
  EXPECT_EQ(d.fault(), no_fault);
}

void compare_backward(const RandomRouting& c, int64_t h, DType dtype, bool weighted, bool want_dprobs,
                      Rng& rng) {
  const Array y = c.rows(dtype, h, rng), dout = Array(dtype, {c.t, h}).randomise(rng);
  const Tensor probs = c.probs_view(), row_of = c.row_of_view(), src = c.src_view();
  const Tensor rows = y.view();
  std::vector<float> dprobs(c.t * c.k, NAN), cpu_dprobs = dprobs;
  Array dy(dtype, {c.r, h}), cpu_dy = dy;
  OnMachine d;
  const Tensor dev_probs = d.in("probs", probs), dev_rows = d.in("y", rows);
  const Tensor dev_dprobs = d.out("dprobs", view(dprobs, {c.t, c.k})), cpu_dp = view(cpu_dprobs, {c.t, c.k});
  unpermute_bwd(d.in("dout", dout.view()), want_dprobs ? &dev_rows : nullptr, d.in("src", src), d.in("row_of", row_of),
                weighted ? &dev_probs : nullptr, d.out("dy", dy.view()), want_dprobs ? &dev_dprobs : nullptr, d.stream());
  unpermute_bwd(dout.view(), want_dprobs ? &rows : nullptr, src, row_of, weighted ? &probs : nullptr, cpu_dy.view(),
                want_dprobs ? &cpu_dp : nullptr, {});
  EXPECT_EQ(dy.bytes(), cpu_dy.bytes());
  for (int64_t i = 0; want_dprobs && i < c.t * c.k; ++i) {
    double size = 0;  // sum of |terms|; the two sums differ in order only
    for (int64_t j = 0; c.row_of[i] >= 0 && j < h; ++j) size += std::fabs(dout[i / c.k * h + j] * y[c.row_of[i] * h + j]);
    ASSERT_NEAR(dprobs[i], cpu_dprobs[i], size * 2e-6) << "choice " << i;
  }
  EXPECT_EQ(d.fault(), no_fault);
}

void compare(const RandomRouting& c, int64_t h, DType dtype, Rng& rng) {
  const bool weighted = rng() % 2;
  compare_forward(c, h, dtype, weighted, rng);
  compare_backward(c, h, dtype, weighted, rng() % 2, rng);
  compare_backward(c, h, dtype, !weighted, true, rng);
}

TEST(CudaUnpermute, SameAsTheCpu) {
  Rng rng(1);
  fuzz(1, rng, [&](const FuzzCase& c) {
    compare(RandomRouting(rng, pick(rng, {0, 1, 9, 30}), pick(rng, {0, 1, 2, 3, 8, 9}), c.load), c.sizes[0], c.dtype, rng);
  });
  compare(RandomRouting(rng, 20, 5, Load::random), 1100, DType::bf16, rng);  // more than one tile a row
}

TEST(CudaUnpermute, NotesBadRowsAndSkipsThem) {
  Rng rng(2);
  const Array y = Array(DType::f32, {3, 4}).randomise(rng);
  const std::vector<int32_t> row_of = {1, 3, -5, 2};
  Array out(DType::f32, {2, 4});
  OnMachine d;
  unpermute(d.in("y", y.view()), d.in("row_of", view(row_of, {2, 2})), nullptr, d.out("out", out.view()), d.stream());
  EXPECT_EQ(d.fault(), fault_word(Fault::unpermute_row_of, 1));
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(out[i], y[4 + i]);
    EXPECT_EQ(out[4 + i], y[8 + i]);
  }
}

// Rows and choices that do not point at each other are nobody's: zero, written once, and noted.
TEST(CudaUnpermute, BackwardNotesMapsThatDisagree) {
  Rng rng(3);
  const Array dout = Array(DType::f32, {2, 4}).randomise(rng), y = Array(DType::f32, {5, 4}).randomise(rng);
  const std::vector<int32_t> row_of = {0, 0, 7, 3}, src = {0, 1, 99, 3, -1};
  std::vector<float> dprobs(4, NAN);
  Array dy(DType::f32, {5, 4});
  OnMachine d;
  const Tensor rows = d.in("y", y.view()), dp = d.out("dprobs", view(dprobs, {2, 2}));
  unpermute_bwd(d.in("dout", dout.view()), &rows, d.in("src", view(src, {5})), d.in("row_of", view(row_of, {2, 2})),
                nullptr, d.out("dy", dy.view()), &dp, d.stream());
  EXPECT_EQ(d.fault(), fault_word(Fault::unpermute_bwd_maps, 1));
  EXPECT_EQ(dprobs[1], 0);
  EXPECT_EQ(dprobs[2], 0);
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(dy[i], dout[i]);
    EXPECT_EQ(dy[12 + i], dout[4 + i]);
    for (int64_t row : {1, 2, 4}) EXPECT_EQ(dy[row * 4 + i], 0);
  }
}

TEST(CudaUnpermute, RowsPastTwoToThe31Elements) {
  const int64_t r = (int64_t{1} << 21) + 5, h = 1032;
  const size_t bytes = static_cast<size_t>(r * h * 2);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* y = static_cast<bf16_t*>(memory);
  y[(r - 1) * h + 3] = 0x3f80;
  y[(r - 2) * h + 3] = 0x4000;
  const std::vector<int32_t> row_of = {static_cast<int32_t>(r - 1), static_cast<int32_t>(r - 2)};
  Array out(DType::bf16, {1, h});
  {
    OnMachine d;
    unpermute(d.in("y", Tensor(y, DType::bf16, {r, h})), d.in("row_of", view(row_of, {1, 2})), nullptr,
              d.out("out", out.view()), d.stream());
  }
  EXPECT_EQ(out[3], 3);
  munmap(memory, bytes);
}

}  // namespace
}  // namespace xt::test
