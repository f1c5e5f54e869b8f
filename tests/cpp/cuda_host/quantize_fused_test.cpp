// On the machine: fused quantization against the two kernels it stands for, bit for bit.
#include "../quantize_fused_cases.h"

#include "cases.h"

namespace xt::test {
namespace {

TEST(CudaQuantizeFused, PermuteHasTheBitsOfThePair) {
  Rng rng(1);
  for (int trial = 0; trial < 6; ++trial) {
    const FusedCase c(rng);
    const Maps maps(rng, pick(rng, {0, 1, 9, 70}), 3);
    const Array x = Array(c.in, {maps.tokens, c.hidden}).randomise(rng);
    Array rows(c.in, {maps.rows, c.hidden});
    permute(x.view(), maps.row_of_view(), maps.src_view(), rows.view(), {});
    RowColArrays cpu(c, maps.rows, maps.experts), ours = cpu;
    const Tensor offsets = view(maps.offsets, {maps.experts + 1});
    quantize_rowcol(rows.view(), offsets, c.params, cpu.q.view(), cpu.scale.view(), cpu.qt.view(), cpu.scale_t.view(), {});
    OnMachine d;
    permute_quantize_rowcol(d.in("x", x.view()), d.in("src", maps.src_view()), maps.k, d.in("offsets", offsets), c.params,
                            d.out("q", ours.q.view()), d.out("scale", ours.scale.view()), d.out("qt", ours.qt.view()),
                            d.out("scale_t", ours.scale_t.view()), d.stream());
    EXPECT_EQ(d.fault(), no_fault);
    EXPECT_TRUE(ours.bytes() == cpu.bytes()) << "trial " << trial;
  }
}

TEST(CudaQuantizeFused, SwigluHasTheBitsOfThePair) {
  Rng rng(2);
  for (int trial = 0; trial < 6; ++trial) {
    const FusedCase c(rng);
    const auto loads = random_rows(rng, pick(rng, {1, 3}));
    const std::vector<int64_t> at = offsets_of(loads);
    const int64_t experts = static_cast<int64_t>(loads.size()), used = at.back(), rows = used + trial % 3;
    const Array x = Array(c.in, {rows, 2 * c.hidden}).randomise(rng);
    SwigluParams params;
    if (trial % 2) params = {1.702, 7.0, 1.0};
    Array act(c.in, {rows, c.hidden});
    RowColArrays pair(c, rows, experts), ours = pair;
    const Tensor offsets = view(at, {experts + 1});
    {
      OnMachine d;  // another e^x than the CPU's
      const Tensor on_device = d.in("offsets", offsets);
      swiglu(d.in_up_to("x", x.view(), used), &on_device, params, d.out("act", act.view()), d.stream());
    }
    quantize_rowcol(act.view(), offsets, c.params, pair.q.view(), pair.scale.view(), pair.qt.view(), pair.scale_t.view(), {});
    OnMachine d;
    swiglu_quantize_rowcol(d.in_up_to("x", x.view(), used), d.in("offsets", offsets), params, c.params,
                           d.out("q", ours.q.view()), d.out("scale", ours.scale.view()), d.out("qt", ours.qt.view()),
                           d.out("scale_t", ours.scale_t.view()), d.stream());
    EXPECT_EQ(d.fault(), no_fault);
    EXPECT_TRUE(ours.bytes() == pair.bytes()) << "trial " << trial;
  }
}

TEST(CudaQuantizeFused, NotesABadChoiceAndTakesZeros) {
  Rng rng(3);
  const Array x = Array(DType::bf16, {2, 128}).randomise(rng);
  const std::vector<int32_t> src = {1, 4};
  const std::vector<int64_t> at = {0, 2};
  FusedCase c(rng);
  c.hidden = 128;
  RowColArrays out(c, 2, 1);
  OnMachine d;
  permute_quantize_rowcol(d.in("x", x.view()), d.in("src", view(src, {2})), 2, d.in("offsets", view(at, {2})), c.params,
                          d.out("q", out.q.view()), d.out("scale", out.scale.view()), d.out("qt", out.qt.view()),
                          d.out("scale_t", out.scale_t.view()), d.stream());
  EXPECT_EQ(d.fault(), fault_word(Fault::gemm_src, 1));
  for (int64_t i = 128; i < 256; ++i) EXPECT_EQ(out.q[i], 0);
}

}  // namespace
}  // namespace xt::test
