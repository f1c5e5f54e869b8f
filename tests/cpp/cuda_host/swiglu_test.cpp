#include "xtuner/ops/swiglu.h"

#include "device.h"

namespace xt::test {
namespace {

const std::vector<SwigluParams> all_params = {{}, {1.702, 7.0, 1.0}, {1.0, 0.5, 0.0}, {0.7, std::nullopt, -0.25}};

// |got - cpu| is within the two kernels' errors of exp (1e-6 relative, see the sources) and one rounding of the output.
void expect_close(const Array& got, const Array& cpu, double scale) {
  for (int64_t i = 0; i < got.count(); ++i) {
    if (std::isnan(cpu[i])) {
      ASSERT_TRUE(std::isnan(got[i])) << "element " << i << " is " << got[i] << ", on the CPU NaN";
    } else if (std::isinf(cpu[i])) {
      ASSERT_EQ(got[i], cpu[i]) << "element " << i;
    } else {
      ASSERT_NEAR(got[i], cpu[i], scale * 2e-6 * (std::fabs(cpu[i]) + 0.1) + got.rounding(cpu[i])) << "element " << i;
    }
  }
}

void compare(DType dtype, int64_t used, int64_t tail, int64_t width, const SwigluParams& p, bool with_offsets, Rng& rng) {
  const int64_t r = used + (with_offsets ? tail : 0);
  const Array x = Array(dtype, {r, 2 * width}).randomise(rng, used * 2 * width);
  const Array dout = Array(dtype, {r, width}).randomise(rng, used * width);
  const std::vector<int64_t> at = {0, used / 2, used};
  const Tensor offsets = view(at, {3});
  Array out(dtype, {r, width}), dx(dtype, {r, 2 * width}), cpu_out = out, cpu_dx = dx;
  OnMachine d;
  const Tensor on_device = d.in("offsets", offsets);
  const Tensor tx = d.in_up_to("x", x.view(), used), tdout = d.in_up_to("dout", dout.view(), used);
  swiglu(tx, with_offsets ? &on_device : nullptr, p, d.out("out", out.view()), d.stream());
  swiglu_bwd(tdout, tx, with_offsets ? &on_device : nullptr, p, d.out("dx", dx.view()), d.stream());
  swiglu(x.view(), with_offsets ? &offsets : nullptr, p, cpu_out.view(), {});
  swiglu_bwd(dout.view(), x.view(), with_offsets ? &offsets : nullptr, p, cpu_dx.view(), {});
  expect_close(out, cpu_out, 1);
  expect_close(dx, cpu_dx, 2);
  EXPECT_EQ(d.fault(), no_fault);
}

TEST(CudaSwiglu, MatchesTheCpu) {
  Rng rng(1);
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (const SwigluParams& p : all_params) {
      for (int64_t width : {1, 7, 8, 127, 128, 129, 768}) {
        compare(dtype, pick(rng, {0, 1, 7, 20}), pick(rng, {0, 1, 12}), width, p, rng() % 2, rng);
      }
    }
    compare(dtype, 0, 5, 16, {}, true, rng);
    compare(dtype, 0, 0, 16, {}, false, rng);
    compare(dtype, 3, 2, 0, {}, true, rng);
  }
}

// Gates from -inf to inf, every scale between, and NaN.
TEST(CudaSwiglu, ExtremeValues) {
  std::vector<double> gates = {0.0, -0.0, INFINITY, -INFINITY, NAN, 3e38, -3e38, 1e-40};
  for (double g = 1e-6; g < 200; g *= 1.3) gates.insert(gates.end(), {g, -g});
  const int64_t n = static_cast<int64_t>(gates.size());
  for (const SwigluParams& p : all_params) {
    Array x(DType::f32, {1, 2 * n}), dout(DType::f32, {1, n}), out(DType::f32, {1, n}), dx(DType::f32, {1, 2 * n});
    for (int64_t i = 0; i < n; ++i) x.set(i, gates[i]), x.set(n + i, 1 + 0.01 * i), dout.set(i, 1);
    Array cpu_out = out, cpu_dx = dx;
    OnMachine d;
    const Tensor tx = d.in("x", x.view());
    swiglu(tx, nullptr, p, d.out("out", out.view()), d.stream());
    swiglu_bwd(d.in("dout", dout.view()), tx, nullptr, p, d.out("dx", dx.view()), d.stream());
    swiglu(x.view(), nullptr, p, cpu_out.view(), {});
    swiglu_bwd(dout.view(), x.view(), nullptr, p, cpu_dx.view(), {});
    expect_close(out, cpu_out, 10);
    expect_close(dx, cpu_dx, 20);
  }
}

TEST(CudaSwiglu, OffsetsPastTheRowsAreNotedAndCut) {
  Rng rng(2);
  const Array x = Array(DType::f32, {2, 16}).randomise(rng);
  Array out(DType::f32, {2, 8}), cpu = out;
  for (int64_t end : {int64_t{3}, int64_t{-1}}) {
    const std::vector<int64_t> at = {0, end};
    OnMachine d;
    const Tensor offsets = d.in("offsets", view(at, {2}));
    swiglu(d.in("x", x.view()), &offsets, {}, d.out("out", out.view()), d.stream());
    EXPECT_EQ(d.fault(), fault_word(Fault::offsets, end));
    if (end > 0) swiglu(x.view(), nullptr, {}, cpu.view(), {});
    if (end < 0) cpu.fill(0);
    expect_close(out, cpu, 1);
  }
}

}  // namespace
}  // namespace xt::test
