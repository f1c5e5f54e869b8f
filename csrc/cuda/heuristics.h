// The one choice that the host makes for a grouped product: how wide a tile is and how many blocks of threads run.
// From shapes alone, as loads are not known on the host. The weights are estimates: no GPU has confirmed them.
#pragma once
#include <algorithm>

#include "cuda/tile_scheduler.h"

namespace xt::cuda {

struct GemmConfig {
  int block_n;
  int64_t blocks;  // of threads, persistent
};

// Tiles of out[R, N] at most: each expert and the unused rows may end in a block that is not full.
inline int64_t most_m_tiles(int64_t rows, int64_t experts, int64_t block_m, int64_t n_blocks) {
  return (rows / block_m + std::min(experts + 1, rows)) * n_blocks;
}

// Time for `m_blocks` (of 128 rows) by N: rounds of all multiprocessors times what one tile takes, in columns of
// tensor-core work. `overhead` is what a tile costs beyond that: its first loads, its rows of the narrower operand
// again, writing it out.
inline double gemm_cost(double m_blocks, int64_t n, int block_n, int multiprocessors) {
  constexpr double overhead = 40;
  const double tiles = m_blocks * static_cast<double>(ceil_div(n, block_n));
  const double rounds = tiles < multiprocessors ? 1 : tiles / multiprocessors + 0.5;  // half of the last one idles
  return rounds * (block_n + overhead);
}

// Builds that measure the other choice (bench/on_gpu.sh check) set XT_BLOCK_N to 128 or 256.
inline int choose_block_n(double m_blocks, int64_t n, int multiprocessors) {
#ifdef XT_BLOCK_N
  constexpr int always = XT_BLOCK_N;
#else
  constexpr int always = 0;
#endif
  if (always) return always;
  return gemm_cost(m_blocks, n, 128, multiprocessors) < gemm_cost(m_blocks, n, 256, multiprocessors) ? 128 : 256;
}

// Hopper, out[R, N]: half a block of rows per expert is expected to be empty.
inline GemmConfig m_grouped_config(int64_t rows, int64_t experts, int64_t n, int multiprocessors) {
  const double m_blocks = static_cast<double>(rows) / 128 + static_cast<double>(std::min(experts, rows)) / 2;
  const int block_n = choose_block_n(m_blocks, n, multiprocessors);
  return {block_n, std::min<int64_t>(multiprocessors, most_m_tiles(rows, experts, 128, ceil_div(n, block_n)))};
}

// Hopper, a product of N columns whose tiles become twice as many: the narrower tile leaves registers for reading
// gate and up ahead.
inline GemmConfig dswiglu_config(int64_t rows, int64_t experts, int64_t n, int multiprocessors) {
  return {128, std::min<int64_t>(multiprocessors, most_m_tiles(rows, experts, 128, ceil_div(n, 128)))};
}

// Hopper, out[E, M, N].
inline GemmConfig k_grouped_config(int64_t experts, int64_t m, int64_t n, int multiprocessors) {
  const int64_t m_blocks = experts * ceil_div(m, 128);
  const int block_n = choose_block_n(static_cast<double>(m_blocks), n, multiprocessors);
  return {block_n, std::min<int64_t>(multiprocessors, m_blocks * ceil_div(n, block_n))};
}

}  // namespace xt::cuda
