#include "xtuner/ops/route_map.h"

#include "cases.h"

namespace xt::test {
namespace {

struct Routing {
  std::vector<int32_t> counts, row_of, src;
  std::vector<int64_t> offsets;

  Routing(int64_t choices, int64_t experts, int64_t rows)
      : counts(experts, -7), row_of(choices, -7), src(rows, -7), offsets(experts + 1, -7) {}
};

template <class Index>
Routing on_machine(const std::vector<Index>& idx, int64_t t, int64_t k, int64_t e, int64_t r, int64_t align,
                   uint64_t& fault) {
  Routing m(t * k, e, r);
  std::vector<int32_t> work(route_map_workspace_size(t * k, e, DeviceType::cuda), -7);
  OnMachine d;
  const Tensor workspace = d.out("workspace", view(work, {static_cast<int64_t>(work.size())}));
  route_map(d.in("topk_idx", view(idx, {t, k})), align, d.out("counts", view(m.counts, {e})),
            d.out("offsets", view(m.offsets, {e + 1})), d.out("row_of", view(m.row_of, {t, k})),
            d.out("src", view(m.src, {r})), d.stream(), &workspace);
  fault = d.fault();
  return m;
}

template <class Index>
void compare(const std::vector<Index>& idx, int64_t t, int64_t k, int64_t e, int64_t r, int64_t align) {
  uint64_t fault;
  const Routing got = on_machine(idx, t, k, e, r, align, fault);
  Routing cpu(t * k, e, r);
  route_map(view(idx, {t, k}), align, view(cpu.counts, {e}), view(cpu.offsets, {e + 1}), view(cpu.row_of, {t, k}),
            view(cpu.src, {r}), {});
  require_same(got.counts, cpu.counts, "counts");
  require_same(got.offsets, cpu.offsets, "offsets");
  require_same(got.row_of, cpu.row_of, "row_of");
  require_same(got.src, cpu.src, "src");
  require(fault == no_fault, "unexpected fault: ", describe_fault(fault));
}

template <class Index>
std::vector<Index> random_indices(Rng& rng, int64_t n, int64_t num_experts) {
  std::vector<Index> idx(n);
  const int kind = static_cast<int>(rng() % 4);  // all dropped, one expert, or spread
  for (Index& i : idx) {
    const bool dropped = kind == 0 || num_experts == 0 || rng() % 8 == 0;
    i = static_cast<Index>(dropped ? -1 : kind == 1 ? num_experts - 1 : rng() % num_experts);
  }
  return idx;
}

}  // namespace

void route_map_case(Rng& rng, DType index, int64_t tokens, int64_t choices, int64_t num_experts, int64_t align) {
  const int64_t n = tokens * choices, rows = n + num_experts * (align - 1) + static_cast<int64_t>(rng() % 3) * 900;
  if (index == DType::i32) {
    compare(random_indices<int32_t>(rng, n, num_experts), tokens, choices, num_experts, rows, align);
  } else {
    compare(random_indices<int64_t>(rng, n, num_experts), tokens, choices, num_experts, rows, align);
  }
}

namespace {

TEST(CudaRouteMap, SameAsTheCpu) {
  Rng rng(1);
  for_each_schedule([&] {
    for (int trial = 0; trial < 12; ++trial) {
      const int64_t t = pick(rng, {0, 1, 5, 127, 128, 129, 700}), k = pick(rng, {0, 1, 2, 3, 8});
      const DType index = trial % 2 ? DType::i32 : DType::i64;
      route_map_case(rng, index, t, k, pick(rng, {0, 1, 3, 33, 128}), pick(rng, {1, 16, 128}));
    }
  });
}

TEST(CudaRouteMap, MoreExpertsThanFitSharedMemory) {
  Rng rng(2);
  for (int trial = 0; trial < 3; ++trial) route_map_case(rng, DType::i32, 400, 6, 2100, 4);
}

// So many choices that a block takes several rounds of them: 512 blocks of 1024 choices are the most there are.
TEST(CudaRouteMap, MoreChoicesThanOneRoundOfBlocks) {
  Rng rng(3);
  std::vector<int32_t> idx(530000);
  for (int32_t& i : idx) i = static_cast<int32_t>(rng() % 9) - 1;
  compare(idx, 265000, 2, 8, 530000, 1);
}

TEST(CudaRouteMap, NotesTheFirstBadIndexAndDropsIt) {
  std::vector<int64_t> idx(6000, 1), good = idx;
  for (int64_t bad : {4500, 3001, 5999}) idx[bad] = bad % 2 ? 4 : int64_t{1} << 40, good[bad] = -1;
  uint64_t fault, none;
  const Routing got = on_machine(idx, 3000, 2, 4, 6000, 1, fault), wanted = on_machine(good, 3000, 2, 4, 6000, 1, none);
  EXPECT_EQ(fault, fault_word(Fault::route_map_index, 3001));
  EXPECT_EQ(none, no_fault);
  EXPECT_EQ(got.row_of, wanted.row_of);
  EXPECT_EQ(got.src, wanted.src);
  EXPECT_NE(describe_fault(fault).find("topk_idx (flat index 3001)"), std::string::npos);
  const std::vector<int64_t> lost = {0, -1};
  on_machine(lost, 1, 2, 0, 2, 1, fault);  // no experts at all
  EXPECT_EQ(fault, fault_word(Fault::route_map_index, 0));
}

TEST(CudaRouteMap, TooFewRowsDropWhatDoesNotFit) {
  const std::vector<int32_t> idx = {0, 1, 1, 0, 2, 2};
  uint64_t fault;
  const Routing got = on_machine(idx, 3, 2, 3, 3, 1, fault);
  EXPECT_EQ(fault, fault_word(Fault::route_map_capacity, 6));
  EXPECT_EQ(got.counts, (std::vector<int32_t>{2, 2, 2}));
  EXPECT_EQ(got.offsets, (std::vector<int64_t>{0, 2, 3, 3}));
  EXPECT_EQ(got.row_of, (std::vector<int32_t>{0, 2, -1, 1, -1, -1}));
  EXPECT_EQ(got.src, (std::vector<int32_t>{0, 3, 1}));
}

TEST(CudaRouteMap, AsksForItsWorkspace) {
  const std::vector<int32_t> idx = {0, 1};
  Routing m(2, 2, 2);
  OnMachine d;
  const auto call = [&](const Tensor* workspace) {
    route_map(d.in("topk_idx", view(idx, {1, 2})), 1, d.out("counts", view(m.counts, {2})),
              d.out("offsets", view(m.offsets, {3})), d.out("row_of", view(m.row_of, {1, 2})),
              d.out("src", view(m.src, {2})), d.stream(), workspace);
  };
  expect_error([&] { call(nullptr); }, "route_map: workspace must hold at least 2 values (route_map_workspace_size), got 0");
  EXPECT_EQ(route_map_workspace_size(0, 5, DeviceType::cuda), 0);
  EXPECT_EQ(route_map_workspace_size(1 << 30, 5, DeviceType::cuda), 5 * 512);
  EXPECT_EQ(route_map_workspace_size(1 << 30, 5, DeviceType::cpu), 0);
}

}  // namespace
}  // namespace xt::test
