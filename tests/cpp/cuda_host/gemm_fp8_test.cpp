// float8 grouped products of the CUDA kernels on the double, against the CPU core: plain kernels, and Hopper's.
#include "cuda/heuristics.h"
#include "gemm_fp8_cases.h"
#include "xtuner/ops/gemm_k_grouped_fp8.h"
#include "xtuner/ops/gemm_m_grouped_fp8.h"

namespace xt::test {
namespace {

struct Path {
  const char* name;
  int compute_capability_major;
  unsigned trials;
  std::vector<int64_t> sizes;  // of features
};

class CudaGemmFp8 : public testing::TestWithParam<Path> {
 protected:
  void SetUp() override { cuda_host::gpu().compute_capability_major = GetParam().compute_capability_major; }
  void TearDown() override {
    cuda_host::gpu() = {};
    cuda_host::set_schedule(0);
  }
};

DType format(unsigned bit) { return bit % 2 ? DType::e5m2 : DType::e4m3; }

// Rows of the experts: fewer, as many and more than a tile has, and none.
std::vector<int64_t> rows_of_experts(Rng& rng) {
  std::vector<int64_t> rows(pick(rng, {1, 3}));
  for (int64_t& n : rows) n = pick(rng, {0, 0, 1, 16, 63, 65, 127, 128, 129});
  return rows;
}

TEST_P(CudaGemmFp8, MGroupedMatchesTheCpu) {
  Rng rng(1);
  for (unsigned trial = 0; trial < GetParam().trials; ++trial) {
    MFp8Case c;
    c.rows = rows_of_experts(rng);
    c.tail = pick(rng, {0, 1, 130});
    c.k = pick(rng, GetParam().sizes);
    c.n = pick(rng, GetParam().sizes);
    c.a = format(trial), c.b = format(trial / 2);
    c.out = trial / 3 % 2 ? DType::f32 : DType::bf16;
    c.swapped_scales = trial / 4 % 2;
    cuda_host::set_schedule(trial % 4);
    ASSERT_NO_THROW(m_grouped_fp8_case(rng, c)) << c.name() << " schedule " << trial % 4;
  }
}

TEST_P(CudaGemmFp8, KGroupedMatchesTheCpu) {
  Rng rng(2);
  for (unsigned trial = 0; trial < GetParam().trials; ++trial) {
    KFp8Case c;
    c.rows = rows_of_experts(rng);
    c.m = pick(rng, {128, 256});
    c.n = pick(rng, GetParam().sizes);
    c.a = format(trial), c.b = format(trial / 2);
    c.out = trial / 3 % 2 ? DType::f32 : DType::bf16;
    c.accumulate = trial / 4 % 2;
    cuda_host::set_schedule(trial % 4);
    ASSERT_NO_THROW(k_grouped_fp8_case(rng, c)) << c.name() << " schedule " << trial % 4;
  }
}

// More blocks of k than there are stages, in every schedule, for both widths of a tile of out[R, N].
TEST(CudaRingFp8, StagesAreReused) {
  Rng rng(6);
  cuda_host::gpu() = {9, 1};
  for (unsigned schedule = 0; schedule < 4; ++schedule) {
    cuda_host::set_schedule(schedule);
    MFp8Case m;
    m.rows = {5, 3};
    for (int64_t n : {128, 512, 1408}) {
      m.n = n, m.k = n == 1408 ? 128 : 1024;  // the last: half of a wide tile is outside
      ASSERT_EQ(cuda::m_grouped_config(8, 2, n, 1).block_n, n == 128 ? 128 : 256);
      ASSERT_NO_THROW(m_grouped_fp8_case(rng, m)) << m.name() << " schedule " << schedule;
    }
    KFp8Case k;
    k.rows = {900, 129};
    ASSERT_NO_THROW(k_grouped_fp8_case(rng, k)) << k.name() << " schedule " << schedule;
  }
  cuda_host::gpu() = {};
  cuda_host::set_schedule(0);
}

// One expert takes all, at a size of Qwen3-30B-A3B's experts.
TEST_P(CudaGemmFp8, OneExpertTakesAll) {
  Rng rng(3);
  MFp8Case m;
  m.n = 128, m.k = 768;
  ASSERT_NO_THROW(m_grouped_fp8_case(rng, m));
  KFp8Case k;
  k.rows = {0, 3, 0}, k.n = 768;
  ASSERT_NO_THROW(k_grouped_fp8_case(rng, k));
}

// A row of scale_a that is no whole number of 16 bytes.
TEST_P(CudaGemmFp8, ScalesOfAnyRowLength) {
  Rng rng(4);
  MFp8Case m;
  m.rows = {3, 4}, m.k = 256, m.ld = 7;
  ASSERT_NO_THROW(m_grouped_fp8_case(rng, m));
  m.ld = 9;
  ASSERT_NO_THROW(m_grouped_fp8_case(rng, m));
}

TEST_P(CudaGemmFp8, NothingToDo) {
  Rng rng(5);
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{}, {0}, {0, 0, 0}}) {
    for (int64_t tail : {0, 1, 200}) {
      MFp8Case m;
      m.rows = rows, m.tail = tail;
      ASSERT_NO_THROW(m_grouped_fp8_case(rng, m)) << m.name();
    }
    for (bool accumulate : {false, true}) {
      KFp8Case k;
      k.rows = rows, k.accumulate = accumulate;
      ASSERT_NO_THROW(k_grouped_fp8_case(rng, k)) << k.name();
    }
  }
  MFp8Case no_k;
  no_k.rows = {3, 2}, no_k.tail = 4, no_k.k = 0;
  ASSERT_NO_THROW(m_grouped_fp8_case(rng, no_k));
}

// Offsets that do not ascend, or whose padded rows leave the columns, are noted and cut; nothing outside is touched.
TEST_P(CudaGemmFp8, NotesBadOffsets) {
  const Array codes(DType::e4m3, {128, 256}), scales(DType::f32, {2, 128});
  const auto fault_of = [&](const std::vector<int64_t>& at, bool m_grouped) {
    OnMachine d;
    const Tensor offsets = d.in("offsets", view(at, {3}));
    if (m_grouped) {
      const Array b(DType::e4m3, {2, 128, 256}), scale_b(DType::f32, {2, 1, 2});
      Array out(DType::f32, {128, 128});
      gemm_m_grouped_fp8(d.in("a", codes.view()), d.in("scale_a", scales.view()), d.in("b", b.view()),
                         d.in("scale_b", scale_b.view()), offsets, d.out("out", out.view()), d.stream());
    } else {
      Array out(DType::f32, {2, 128, 128});
      gemm_k_grouped_fp8(d.in("a", codes.view()), d.in("scale_a", scales.view()), d.in("b", codes.view()),
                         d.in("scale_b", scales.view()), offsets, 0, d.out("out", out.view()), d.stream());
    }
    return d.fault();
  };
  EXPECT_EQ(fault_of({0, 30, 20}, true), fault_word(Fault::offsets_order, 2));
  EXPECT_EQ(fault_of({0, 30, 129}, true), fault_word(Fault::offsets, 129));
  EXPECT_EQ(fault_of({0, 30, 20}, false), fault_word(Fault::offsets_order, 2));
  EXPECT_EQ(fault_of({0, 30, INT64_MAX}, false), fault_word(Fault::offsets, INT64_MAX));
  EXPECT_EQ(fault_of({0, 1, 130}, false), fault_word(Fault::gemm_columns, 1));
  EXPECT_EQ(fault_of({0, 128, 256}, false), no_fault);
}

TEST_P(CudaGemmFp8, RefusesMisalignedMemory) {
  const Array codes(DType::e4m3, {2, 128}), scales(DType::f32, {1, 8}), b(DType::e4m3, {1, 128, 128}),
      scale_b(DType::f32, {1, 1, 1});
  Array out(DType::bf16, {1, 128});
  const std::vector<int64_t> at = {0, 1};
  OnMachine d;
  const auto call = [&](int64_t code, int64_t scale) {
    Tensor a = d.in("a", codes.view()), s = d.in("scale_a", scales.view());
    a.shape[0] = 1, a.data = static_cast<char*>(a.data) + code;
    s.shape[1] = s.strides[0] = 4, s.data = static_cast<char*>(s.data) + scale;
    gemm_m_grouped_fp8(a, s, d.in("b", b.view()), d.in("scale_b", scale_b.view()), d.in("at", view(at, {2})),
                       d.out("out", out.view()), d.stream());
  };
  expect_error([&] { call(1, 0); }, "gemm_m_grouped_fp8: a must start at a multiple of 16 bytes");
  expect_error([&] { call(0, 4); }, "gemm_m_grouped_fp8: scale_a must start at a multiple of 16 bytes");
}

INSTANTIATE_TEST_SUITE_P(Paths, CudaGemmFp8, testing::Values(Path{"plain", 8, 4, {128, 256}}, Path{"wgmma", 9, 8, {128, 256, 384}}),
                         [](const auto& p) { return p.param.name; });

}  // namespace
}  // namespace xt::test
