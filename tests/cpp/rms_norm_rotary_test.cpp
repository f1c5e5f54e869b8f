#include "xtuner/ops/rms_norm_rotary.h"

#include "helpers.h"
#include "xtuner/ops/rms_norm.h"
#include "xtuner/ops/rotary.h"

namespace xt::test {
namespace {

constexpr double eps = 1e-3;

// A view of [T, H, …] as [T * H, …].
Tensor rows_of(const Tensor& t) {
  Tensor rows = t;
  rows.ndim = t.ndim - 1;
  rows.shape[0] = t.shape[0] * t.shape[1];
  for (int i = 1; i < rows.ndim; ++i) rows.shape[i] = t.shape[i + 1];
  int64_t step = 1;
  for (int i = rows.ndim - 1; i >= 0; --i) {
    rows.strides[i] = step;
    step *= rows.shape[i];
  }
  return rows;
}

void check(DType dtype, int64_t tokens, int64_t heads, int64_t half, Rng& rng) {
  SCOPED_TRACE("tokens " + std::to_string(tokens) + ", heads " + std::to_string(heads) + ", half " +
               std::to_string(half));
  const int64_t width = 2 * half;
  const Shape shape = {tokens, heads, width};
  const Array x = Array(dtype, shape).randomise(rng), dout = Array(dtype, shape).randomise(rng);
  const Array weight = Array(dtype, {width}).randomise(rng);
  const Array cos = Array(dtype, {tokens, half}).randomise(rng), sin = Array(dtype, {tokens, half}).randomise(rng);
  const Array space(DType::f32, {(tokens * heads + rms_norm_block_rows - 1) / rms_norm_block_rows, width});

  // Either half on its own, which has its own test, gives the bits.
  Array normed(dtype, shape), out(dtype, shape), inverse(DType::f32, {tokens, heads});
  rms_norm(rows_of(x.view()), weight.view(), eps, rows_of(normed.view()), rows_of(inverse.view()), {});
  rotary(normed.view(), cos.view(), sin.view(), false, out.view(), {});
  Array turned(dtype, shape), dx(dtype, shape), dweight(dtype, {width});
  rotary(dout.view(), cos.view(), sin.view(), true, turned.view(), {});
  rms_norm_bwd(rows_of(turned.view()), rows_of(x.view()), weight.view(), rows_of(inverse.view()), rows_of(dx.view()),
               dweight.view(), space.view(), {});

  Array again_inverse(DType::f32, {tokens, heads});
  const auto forward = [&](int threads, Array& into) {
    rms_norm_rotary(x.view(), weight.view(), cos.view(), sin.view(), eps, into.view(), again_inverse.view(),
                    {nullptr, threads});
  };
  const auto backward = [&](int threads, Array& dx_into, Array& dweight_into) {
    rms_norm_rotary_bwd(dout.view(), x.view(), weight.view(), cos.view(), sin.view(), inverse.view(), dx_into.view(),
                        dweight_into.view(), space.view(), {nullptr, threads});
  };
  Array our_out(dtype, shape), our_dx(dtype, shape), our_dweight(dtype, {width});
  forward(1, our_out);
  backward(1, our_dx, our_dweight);
  for (int64_t i = 0; i < tokens * heads * width; ++i) {
    ASSERT_EQ(our_out[i], out[i]) << "element " << i;
    ASSERT_EQ(our_dx[i], dx[i]) << "element " << i;
  }
  for (int64_t i = 0; i < width; ++i) ASSERT_EQ(our_dweight[i], dweight[i]);
  for (int64_t i = 0; i < tokens * heads; ++i) ASSERT_EQ(again_inverse[i], inverse[i]);
  expect_same_bits(Array(dtype, shape), forward);
  expect_same_bits(Array(dtype, shape), [&](int threads, Array& into) {
    Array other(dtype, {width});
    backward(threads, into, other);
  });
  expect_same_bits(Array(dtype, {width}), [&](int threads, Array& into) {
    Array other(dtype, shape);
    backward(threads, other, into);
  });
}

TEST(RmsNormRotary, HasTheBitsOfItsHalves) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t half : odd_sizes) check(dtype, pick(rng, {1, 2, 7}), pick(rng, {1, 3}), half, rng);
      for (int64_t tokens : {0, 1, 8, 127, 128, 129, 300}) check(dtype, tokens, 3, pick(rng, {8, 20}), rng);
      check(dtype, 3, 200, 4, rng);  // more heads than a block has rows
      check(dtype, 3, 0, 4, rng);
    }
  });
}

TEST(RmsNormRotary, NamesBadArguments) {
  const Array odd(DType::f32, {2, 1, 5}), x(DType::f32, {2, 1, 6}), table(DType::f32, {2, 3}), wide(DType::f32, {2, 6});
  const Array weight(DType::f32, {6}), inverse(DType::f32, {2, 1}), space(DType::f32, {2, 6});
  const auto forward = [&](const Array& in, const Array& sin, double epsilon) {
    rms_norm_rotary(in.view(), weight.view(), table.view(), sin.view(), epsilon, in.view(), inverse.view(), {});
  };
  expect_error([&] { forward(odd, table, 0); },
               "rms_norm_rotary: x must have an even number of features per head, got 5");
  expect_error([&] { forward(x, wide, 0); },
               "rms_norm_rotary: sin must be float32 [T=2, D/2=3], got float32 [2, 6] on cpu");
  expect_error([&] { forward(x, table, -1); }, "rms_norm_rotary: eps must not be negative, got -1");
  expect_error(
      [&] {
        rms_norm_rotary_bwd(x.view(), x.view(), weight.view(), table.view(), table.view(), inverse.view(), x.view(),
                            weight.view(), space.view(), {});
      },
      "rms_norm_rotary_bwd: workspace must be float32 [T*H/128=1, D=6], got float32 [2, 6] on cpu");
}

}  // namespace
}  // namespace xt::test
