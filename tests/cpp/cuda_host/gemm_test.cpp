// Grouped products of the CUDA kernels on the double, against the CPU core: plain, mma.sync and wgmma kernels alike.
#include "gemm_cases.h"
#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::test {
namespace {

struct Path {
  const char* name;
  int compute_capability_major;
  std::vector<DType> dtypes;
  std::vector<int64_t> sizes;  // of features
  unsigned trials;
};

const Path plain = {"plain", 8, {DType::f32, DType::bf16}, {1, 7, 65, 129}, 10};
const Path mma_sync = {"mma_sync", 8, {DType::bf16}, {8, 64, 120, 136, 200}, 20};
const Path wgmma = {"wgmma", 9, {DType::bf16}, {8, 64, 120, 136, 264, 400}, 20};

// Rows of the experts: fewer, as many and more than a tile has, and none.
std::vector<int64_t> rows_of_experts(Rng& rng) {
  std::vector<int64_t> rows(pick(rng, {1, 2, 4}));
  for (int64_t& n : rows) n = pick(rng, {0, 0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200});
  return rows;
}

class CudaGemm : public testing::TestWithParam<Path> {
 protected:
  void SetUp() override { cuda_host::gpu().compute_capability_major = GetParam().compute_capability_major; }
  void TearDown() override {
    cuda_host::gpu() = {};
    cuda_host::set_schedule(0);
  }
};

TEST_P(CudaGemm, MGroupedMatchesTheCpu) {
  const Path& path = GetParam();
  Rng rng(1);
  for (unsigned trial = 0; trial < path.trials; ++trial) {
    MCase c;
    c.rows = rows_of_experts(rng);
    c.tail = pick(rng, {0, 1, 130});
    c.k = pick(rng, path.sizes);
    c.n = pick(rng, path.sizes);
    c.trans_b = trial % 2;
    c.in = path.dtypes[trial % path.dtypes.size()];
    c.out = trial / 2 % 2 ? DType::f32 : DType::bf16;
    c.bias = trial / 4 % 2;
    c.swiglu = trial / 3 % 2;
    if (c.swiglu) c.n *= 2;
    c.per_token = trial / 5 % 2 ? 2 : 0;
    cuda_host::set_schedule(trial % 4);
    ASSERT_NO_THROW(m_grouped_case(rng, c)) << c.name() << " schedule " << trial % 4;
  }
}

TEST_P(CudaGemm, KGroupedMatchesTheCpu) {
  const Path& path = GetParam();
  Rng rng(2);
  for (unsigned trial = 0; trial < path.trials; ++trial) {
    KCase c;
    c.rows = rows_of_experts(rng);
    c.tail = pick(rng, {0, 3, 130});
    c.m = pick(rng, path.sizes);
    c.n = pick(rng, path.sizes);
    c.in = path.dtypes[trial % path.dtypes.size()];
    c.out = trial / 2 % 2 ? DType::f32 : DType::bf16;
    c.accumulate = trial / 4 % 2;
    c.per_token = trial / 3 % 2 ? 2 : 0;
    cuda_host::set_schedule(trial % 4);
    ASSERT_NO_THROW(k_grouped_case(rng, c)) << c.name() << " schedule " << trial % 4;
  }
}

TEST_P(CudaGemm, DswigluMatchesTheSeparateStepsAndTheFormula) {
  const Path& path = GetParam();
  Rng rng(6);
  for (unsigned trial = 0; trial < path.trials; ++trial) {
    DswigluCase c;
    c.rows = rows_of_experts(rng);
    c.tail = pick(rng, {0, 1, 130});
    c.k = pick(rng, path.sizes);
    c.n = pick(rng, path.sizes);
    c.in = path.dtypes[trial % path.dtypes.size()];
    c.weighted = trial / 2 % 2;
    cuda_host::set_schedule(trial % 4);
    ASSERT_NO_THROW(dswiglu_case(rng, c)) << c.name() << " k " << c.k << " schedule " << trial % 4;
  }
}

// Of the kernels that load ahead: more stages than any ring has, in every schedule, for both widths of a tile.
class CudaRing : public CudaGemm {};

TEST_P(CudaRing, StagesAreReused) {
  Rng rng(5);
  for (unsigned trial = 0; trial < 8; ++trial) {
    cuda_host::set_schedule(trial % 4);
    MCase m;
    m.rows = {5, 3}, m.n = trial / 4 ? 136 : 8, m.k = 520, m.in = GetParam().dtypes[0];
    m.per_token = trial % 2;
    ASSERT_NO_THROW(m_grouped_case(rng, m)) << m.name() << " schedule " << trial % 4;
    KCase k;
    k.rows = {470, 60}, k.n = m.n, k.in = m.in, k.per_token = m.per_token;
    ASSERT_NO_THROW(k_grouped_case(rng, k)) << k.name() << " schedule " << trial % 4;
  }
}

TEST_P(CudaGemm, NothingToDo) {
  Rng rng(3);
  const int64_t n = GetParam().sizes[1];
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{}, {0}, {0, 0, 0}}) {
    for (int64_t tail : {0, 1, 200}) {
      MCase m;
      m.rows = rows, m.tail = tail, m.n = n, m.k = n, m.in = GetParam().dtypes[0];
      ASSERT_NO_THROW(m_grouped_case(rng, m)) << m.name();
      KCase k;
      k.rows = rows, k.tail = tail, k.n = n, k.m = n, k.in = GetParam().dtypes[0];
      ASSERT_NO_THROW(k_grouped_case(rng, k)) << k.name();
      DswigluCase d;
      d.rows = rows, d.tail = tail, d.n = n, d.k = n, d.in = GetParam().dtypes[0], d.weighted = tail == 1;
      ASSERT_NO_THROW(dswiglu_case(rng, d)) << d.name();
    }
  }
  MCase no_k;
  no_k.rows = {3, 2}, no_k.tail = 4, no_k.n = n, no_k.k = 0, no_k.in = GetParam().dtypes[0];
  ASSERT_NO_THROW(m_grouped_case(rng, no_k));
}

// Bad offsets and indices are noted; the rest of the output is as if they were cut or dropped.
TEST_P(CudaGemm, NotesBadOffsetsAndIndices) {
  Rng rng(4);
  const DType dtype = GetParam().dtypes[0];
  const int64_t n = GetParam().sizes[1], rows = 40;
  const Array a = Array(dtype, {rows, n}).randomise(rng), b = Array(dtype, {2, n, n}).randomise(rng);
  const auto run = [&](const std::vector<int64_t>& at, const std::vector<int32_t>& src, bool on_device,
                       uint64_t* fault) {
    Array out(dtype, {rows, n});
    OnMachine d;
    const Tensor offsets = view(at, {3}), map = view(src, {rows});
    const Tensor d_map = d.in("src", map);
    GemmMGroupedOptions options;
    options.gather = {on_device ? &d_map : &map, 1};
    if (on_device) {
      gemm_m_grouped(d.in("a", a.view()), d.in("b", b.view()), d.in("offsets", offsets), true, d.out("out", out.view()),
                     d.stream(), options);
    } else {
      gemm_m_grouped(a.view(), b.view(), offsets, true, out.view(), {}, options);
    }
    if (fault) *fault = d.fault();
    std::vector<double> values;
    for (int64_t i = 0; i < out.count(); ++i) values.push_back(out[i]);
    return values;
  };
  std::vector<int32_t> src(rows);
  std::iota(src.begin(), src.end(), 0);
  const auto compare = [&](std::vector<int64_t> bad_at, std::vector<int64_t> good_at, std::vector<int32_t> bad_src,
                           std::vector<int32_t> good_src, uint64_t wanted) {
    uint64_t fault = 0;
    const auto got = run(bad_at, bad_src, true, &fault), cpu = run(good_at, good_src, false, nullptr);
    EXPECT_EQ(fault, wanted);
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], cpu[i], 0.01 * (std::fabs(cpu[i]) + 1)) << i;
  };
  compare({0, 30, 20}, {0, 30, 30}, src, src, fault_word(Fault::offsets_order, 2));
  compare({0, 30, 41}, {0, 30, 40}, src, src, fault_word(Fault::offsets, 41));
  compare({5, 30, 40}, {0, 30, 40}, src, src, fault_word(Fault::offsets_order, 0));
  std::vector<int32_t> bad = src, dropped = src;
  bad[7] = 40, bad[9] = -2, bad[33] = INT32_MIN;
  dropped[7] = dropped[9] = dropped[33] = -1;
  compare({0, 30, 40}, {0, 30, 40}, bad, dropped, fault_word(Fault::gemm_src, 7));
}

INSTANTIATE_TEST_SUITE_P(Paths, CudaRing, testing::Values(mma_sync, wgmma),
                         [](const auto& p) { return p.param.name; });
INSTANTIATE_TEST_SUITE_P(Paths, CudaGemm, testing::Values(plain, mma_sync, wgmma),
                         [](const auto& p) { return p.param.name; });

}  // namespace
}  // namespace xt::test
