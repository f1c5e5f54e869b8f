#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {
namespace {

// All sizes in elements. Packed V (256 KiB) and a slice of Q share a core's L2; V's panels pass through L1 one by one.
constexpr int64_t packed_v_budget = 65536;
constexpr int64_t slice_rows = 96;
constexpr int64_t widest_v = 256, narrowest_v = 32;
constexpr int64_t longest_q = 1024;      // beyond that, packing V again costs nothing any more
constexpr int64_t longest_q_sums = 512;  // when all of a tile's sums wait in scratch
constexpr int64_t tiles_per_thread = 3;  // so that the last tiles to finish leave little idle time
constexpr int64_t cached_output = int64_t{16} << 20;  // bytes; more will not be found in cache by whoever reads it

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `extent` in equal parts of at most `most`, each a multiple of `step` (except the last).
int64_t even_part(int64_t extent, int64_t most, int64_t step) {
  return round_up(ceil_div(extent, ceil_div(extent, most)), step);
}

double work_of(const GemmProblem& p, int64_t num_q, int64_t num_v) {
  return static_cast<double>(num_q) * static_cast<double>(num_v) * static_cast<double>(p.num_k);
}

struct Task {
  GemmTile tile;
  double work;
};

}  // namespace

// Of each packed element, in multiples of a plain copy; an operand read in place still has to come closer.
constexpr double cost_of_turning = 2, cost_of_copying = 1, cost_in_place = 0.3;

bool reads_q_in_place(const GemmProblem& p) { return p.q.col == 1 && !p.q.index; }

// V is packed once per part of q, Q once per part of v. Of all parts with the work wanted, those for which least is
// packed; narrow ones keep a wide range of k in packed_v_budget.
void choose_parts(const GemmProblem& p, double outputs, int64_t v_halves, int64_t halves, int64_t q_most, int tile_rows,
                  int tile_cols, GemmPlan& plan) {
  const double v_cost = p.v.row == 1 ? cost_of_copying : cost_of_turning;
  const double q_cost = reads_q_in_place(p) ? cost_in_place : cost_of_copying;
  double least = 0;
  for (int64_t widest = widest_v; widest >= narrowest_v; widest /= 2) {
    const int64_t v = even_part(p.num_v, std::max<int64_t>(widest / v_halves, 1), tile_cols);
    const double wanted = outputs / static_cast<double>(v * halves);
    const int64_t q = even_part(p.num_q, std::clamp<int64_t>(static_cast<int64_t>(wanted), slice_rows, q_most), tile_rows);
    const double cost = v_cost / static_cast<double>(q) + q_cost / static_cast<double>(v * v_halves);
    if (least == 0 || cost < least) least = cost, plan.v_part = v, plan.q_part = q;
  }
}

GemmPlan plan_gemm(const GemmProblem& p, double work_per_tile, int tile_rows, int tile_cols, bool pairs) {
  const KBlocks blocks(p, pairs ? 2 : 1);
  const bool turned = p.out.v_stride != 1, direct = sums_in_output(p.out);
  const int64_t halves = p.epilogue.half ? 2 : 1, v_halves = turned ? 1 : halves, q_halves = turned ? halves : 1;
  GemmPlan plan;
  const int64_t q_most = direct ? longest_q : longest_q_sums;
  choose_parts(p, work_per_tile / static_cast<double>(p.num_k), v_halves, halves, q_most, tile_rows, tile_cols, plan);
  const int64_t v_cols = v_halves * plan.v_part;
  plan.blocks_per_pass = std::clamp<int64_t>(packed_v_budget / (v_cols * blocks.length), 1, blocks.count);
  // The fewer columns of V there are, the less often a row of Q is used, and the longer the runs in which it should be
  // read from memory: more blocks of fewer rows.
  plan.slice = std::max<int64_t>(1, slice_rows / plan.blocks_per_pass / tile_rows) * tile_rows;
  plan.packed_q_row = plan.blocks_per_pass * blocks.length + 16;  // no power of two: rows must not share cache sets
  const bool one_pass = plan.blocks_per_pass == blocks.count;
  plan.packed_v = plan.blocks_per_pass * v_cols * blocks.length;
  plan.packed_q = plan.slice * plan.packed_q_row + 64;
  plan.sums = direct ? 0 : (one_pass ? plan.slice : q_halves * plan.q_part) * v_cols;
  return plan;
}

void run_gemms(const std::vector<GemmProblem>& problems, int num_threads) {
  const Kernels& isa = kernels();
  double total = 0;
  int64_t out_bytes = 0;
  for (const GemmProblem& p : problems) {
    total += work_of(p, p.num_q, p.num_v);
    out_bytes += p.num_q * p.num_v * size_of(p.out.dtype);
  }
  const double work_per_tile = total / (num_threads > 1 ? static_cast<double>(tiles_per_thread) * num_threads : 1);
  const bool stream = out_bytes > cached_output;

  std::vector<GemmPlan> plans;
  plans.reserve(problems.size());
  std::vector<Task> tasks;
  for (const GemmProblem& p : problems) {
    const bool pairs = p.q.dtype != DType::f32 && isa.gemm_pairs_bf16;
    plans.push_back(plan_gemm(p, work_per_tile, isa.tile_rows, isa.tile_cols, pairs));
    const GemmPlan& plan = plans.back();
    for (int64_t v = 0; v < p.num_v; v += plan.v_part) {
      for (int64_t q = 0; q < p.num_q; q += plan.q_part) {
        const int64_t q1 = std::min(p.num_q, q + plan.q_part), v1 = std::min(p.num_v, v + plan.v_part);
        tasks.push_back({{&p, &plan, q, q1, v, v1, stream}, work_of(p, q1 - q, v1 - v)});
      }
    }
  }
  // Largest first: a big tile must not be the last to start.
  if (num_threads > 1) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  }
  parallel_for(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const GemmTileFn run = task.tile.problem->q.dtype == DType::f32 ? isa.gemm_tile_f32 : isa.gemm_tile_bf16;
    run(task.tile, thread_scratch(task.tile.plan->scratch()));
  });
}

}  // namespace xt::cpu
