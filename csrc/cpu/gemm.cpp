#include "cpu/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {
namespace {

// All sizes in floats. Packed V (256 KiB) and a slice of Q share a core's L2; V's panels pass through L1 one by one.
constexpr int64_t packed_v_budget = 65536;
constexpr int64_t widest_v = 256, narrowest_v = 64;
constexpr int64_t slice_rows = 96;      // at least GemmTileRunner::slice
constexpr int64_t longest_q = 1024;     // beyond that, packing V again costs nothing any more
constexpr int64_t longest_q_sums = 256;  // when all of a tile's sums wait in scratch
constexpr int64_t tiles_per_thread = 6;  // so that the last tiles to finish leave little idle time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `extent` in equal parts of at most `most`, each a multiple of `step` (except the last).
int64_t even_part(int64_t extent, int64_t most, int64_t step) {
  return round_up(ceil_div(extent, ceil_div(extent, most)), step);
}

struct Plan {
  int64_t q_part, v_part;
  GemmScratchSize scratch;
};

// Tile size of one problem. Affects speed only: sums are cut along k by KBlocks, never here.
Plan plan_for(const GemmProblem& p, double work_per_tile, const Kernels& isa) {
  const KBlocks blocks(p.num_k);
  const bool direct = sums_in_output(p.out);
  Plan plan;
  // Many rows of Q: all of k in one pass, so that a slice's sums stay in L2. Otherwise, and where Q must be packed again
  // for every part of V, wide parts are better.
  const int64_t fits = packed_v_budget / (blocks.count * blocks.length);
  const bool many_rows = p.q.col == 1 && p.num_q > longest_q_sums;
  const int64_t v_most = many_rows ? std::clamp(fits, narrowest_v, widest_v) : widest_v;
  plan.v_part = even_part(p.num_v, v_most, isa.tile_cols);
  const bool one_pass = k_blocks_per_pass(blocks, plan.v_part) == blocks.count;
  const int64_t q_most = one_pass || direct ? longest_q : longest_q_sums;
  const double wanted = work_per_tile / (static_cast<double>(plan.v_part) * p.num_k);
  plan.q_part = even_part(p.num_q, std::clamp<int64_t>(static_cast<int64_t>(wanted), slice_rows, q_most), isa.tile_rows);
  plan.scratch.packed_v = k_blocks_per_pass(blocks, plan.v_part) * plan.v_part * blocks.length;
  plan.scratch.packed_q = slice_rows * (KBlocks::longest + 16);
  plan.scratch.sums = direct ? 0 : (one_pass ? slice_rows : plan.q_part) * plan.v_part;
  return plan;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// This thread's scratch memory, kept from call to call.
float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats * 4, 64)))));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

struct Task {
  GemmTile tile;
  const Plan* plan;
  double work;
};

}  // namespace

int64_t k_blocks_per_pass(const KBlocks& blocks, int64_t v_cols) {
  return std::clamp<int64_t>(packed_v_budget / (v_cols * blocks.length), 1, blocks.count);
}

void run_gemms(const std::vector<GemmProblem>& problems, int num_threads) {
  const Kernels& isa = kernels();
  double total = 0;
  for (const GemmProblem& p : problems) total += static_cast<double>(p.num_q) * p.num_v * p.num_k;
  const double work_per_tile = total / (num_threads > 1 ? static_cast<double>(tiles_per_thread) * num_threads : 1);

  std::vector<Plan> plans;
  plans.reserve(problems.size());
  std::vector<Task> tasks;
  for (const GemmProblem& p : problems) {
    plans.push_back(plan_for(p, work_per_tile, isa));
    const Plan& plan = plans.back();
    for (int64_t v = 0; v < p.num_v; v += plan.v_part) {
      for (int64_t q = 0; q < p.num_q; q += plan.q_part) {
        const GemmTile tile = {&p, q, std::min(p.num_q, q + plan.q_part), v, std::min(p.num_v, v + plan.v_part)};
        tasks.push_back({tile, &plan, static_cast<double>(tile.q1 - q) * (tile.v1 - v) * p.num_k});
      }
    }
  }
  // Largest first: a big tile must not be the last to start.
  if (num_threads > 1) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  }
  parallel_for(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    isa.gemm_tile(task.tile, task.plan->scratch, thread_scratch(task.plan->scratch.total()));
  });
}

}  // namespace xt::cpu
