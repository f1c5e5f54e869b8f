#include "xtuner/ops/permute.h"

#include "device.h"
#include "routing.h"

namespace xt::test {
namespace {

void compare(DType dtype, Load load, int64_t t, int64_t k, int64_t h, Rng& rng) {
  Array x(dtype, {t, h});
  std::vector<unsigned char> bits(x.bytes().size());
  for (unsigned char& b : bits) b = static_cast<unsigned char>(rng());  // NaNs too
  std::memcpy(x.view().data, bits.data(), bits.size());
  const RandomRouting m(rng, t, k, load);
  Array got(dtype, {m.r, h}), cpu(dtype, {m.r, h});
  OnMachine d;
  permute(d.in("x", x.view()), d.in("row_of", m.row_of_view()), d.in("src", m.src_view()), d.out("out", got.view()),
          d.stream());
  permute(x.view(), m.row_of_view(), m.src_view(), cpu.view(), {});
  EXPECT_EQ(got.bytes(), cpu.bytes()) << "T=" << t << " K=" << k << " H=" << h;
  EXPECT_EQ(d.fault(), no_fault);
}

TEST(CudaPermute, SameBitsAsTheCpu) {
  Rng rng(1);
  for_each_schedule([&] {
    fuzz(1, rng, [&](const FuzzCase& c) {
      compare(c.dtype, c.load, pick(rng, {0, 1, 17, 60}), pick(rng, {0, 1, 2, 8}), c.sizes[0], rng);
    });
  });
  compare(DType::bf16, Load::random, 9, 3, 1100, rng);  // more than one tile a row
}

// Entries that the other map does not confirm are nobody's: zero, written once, and noted.
TEST(CudaPermute, NotesMapsThatDisagree) {
  Rng rng(2);
  const Array x = Array(DType::bf16, {2, 8}).randomise(rng);
  const std::vector<int32_t> row_of = {0, 0, 7, 3}, src = {0, 1, 99, 3, -1};
  Array out(DType::bf16, {5, 8});
  OnMachine d;
  permute(d.in("x", x.view()), d.in("row_of", view(row_of, {2, 2})), d.in("src", view(src, {5})),
          d.out("out", out.view()), d.stream());
  EXPECT_EQ(d.fault(), fault_word(Fault::permute_maps, 1));
  EXPECT_EQ(describe_fault(d.fault()), "permute: src and row_of must be each other's inverse, but differ at index 1");
  for (int64_t i = 0; i < 8; ++i) {
    EXPECT_EQ(out[i], x[i]);
    EXPECT_EQ(out[24 + i], x[8 + i]);
    for (int64_t row : {1, 2, 4}) EXPECT_EQ(out[row * 8 + i], 0);
  }
}

TEST(CudaPermute, RefusesMisalignedMemory) {
  Array x(DType::f32, {3, 4}), out(DType::f32, {2, 4});
  const std::vector<int32_t> map = {0, 1};
  OnMachine d;
  const Tensor shifted = d.in("x", Tensor(x.view().ptr<float>() + 1, DType::f32, {2, 4}));
  const Tensor row_of = d.in("row_of", view(map, {2, 1}));
  expect_error([&] { permute(shifted, row_of, d.in("src", view(map, {2})), d.out("out", out.view()), d.stream()); },
               "permute: x must start at a multiple of 16 bytes, got float32 [2, 4] on cuda:1 starting 4 bytes past one");
}

}  // namespace
}  // namespace xt::test
