// float8 products of ragged groups of rows on Hopper: as gemm_m_grouped.cu, one stage per block of 128 k. Tensor cores
// sum a block; its sums are scaled and added to those before in float32 registers.
#include "cuda/gemm_epilogue.h"
#include "cuda/heuristics.h"
#include "cuda/sm90/gemm_fp8_tile.h"

namespace xt::cuda::sm90 {
namespace {

template <int block_n>
using Stages = Fp8Stages<block_n, false>;

template <int block_n>
__device__ MTiles tiles_of(const MGroupedFp8& g) {
  return MTiles(g.offsets, g.experts, g.rows, block_m, ceil_div(g.n, block_n), blockIdx.x, gridDim.x);
}

// By one thread.
template <int block_n>
__device__ void load(const MGroupedFp8& g, const CUtensorMap& a_map, const CUtensorMap& a_scale_map,
                     const CUtensorMap& b_map, const Stages<block_n>& stages) {
  const auto ring = stages.ring();
  MTiles tiles = tiles_of<block_n>(g);
  Place<Stages<block_n>::count> at;
  for (MTile t; tiles.next(t);) {
    if (t.expert == g.experts) continue;
    const int row = static_cast<int>(t.row), n = static_cast<int>(t.n_block * block_n), e = static_cast<int>(t.expert);
    for (int k = 0; k < g.k; k += fp8_block, at.advance()) {
      const uint32_t full = ring.full(at.stage);
      ring.wait_empty(at);
      barrier_arrive_expect(full, Stages<block_n>::bytes);
      load_tile(stages.a(at.stage), a_map, full, k, row);
      load_tile(stages.a_scales(at.stage), a_scale_map, full, row, k / fp8_block);
      load_tile(stages.b(at.stage), b_map, full, k, n, 0, e);
    }
  }
}

// Unused rows, by the threads of the loading warpgroup that have nothing to load.
template <int block_n>
__device__ void zero(const MGroupedFp8& g) {
  const Epilogue epilogue = plain(g.epilogue);
  MTiles tiles = tiles_of<block_n>(g);
  for (MTile t; tiles.next(t);) {
    if (t.expert < g.experts) continue;
    zero_tile(epilogue, t.row, min(t.rows_end, t.row + block_m), tile_columns(epilogue, t.n_block, block_n), block_n / 8,
              static_cast<int>(threadIdx.x) - warp_size, idle_threads);
  }
}

// By a warpgroup that multiplies.
template <class A, class B, int block_n>
__device__ void multiply(const MGroupedFp8& g, const Stages<block_n>& stages) {
  constexpr int parts = block_n / part_n;
  const auto ring = stages.ring();
  const int thread = static_cast<int>(threadIdx.x) - warpgroup, group = thread / warpgroup;
  const int row_in_tile = thread / warp_size * 16;  // of this warp
  Epilogue epilogue = plain(g.epilogue);
  epilogue.accumulate = false;
  MTiles tiles = tiles_of<block_n>(g);
  Place<Stages<block_n>::count> at;
  for (MTile t; tiles.next(t);) {
    if (t.expert == g.experts) continue;
    const float* scale_b = g.scale_b + t.expert * g.scale_b_expert + t.n_block * parts * g.scale_b_n;
    const bool whole = (t.n_block + 1) * block_n <= g.n;  // else the last part of b's tile does not exist
    float sums[parts * part_blocks][4] = {};
    for (int k = 0; k < g.k; k += fp8_block, at.advance()) {
      ring.wait_full(at);
      const RowScales a_scales = RowScales::load(stages.a_scales(at.stage), row_in_tile);
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        // On its way while the block is multiplied.
        const float b_scale = p == 0 || whole ? __ldg(scale_b + p * g.scale_b_n) : 0.0f;
        float of_block[part_blocks][4];
        multiply_block<A, B>(stages.a(at.stage), stages.b(at.stage) + static_cast<uint32_t>(p * part_n * 128), group,
                             of_block);
        if (p == parts - 1) {
          __syncwarp();  // all lanes have their scales
          ring.release(at.stage);
        }
        const float low = a_scales.low * b_scale, high = a_scales.high * b_scale;
#pragma unroll
        for (int j = 0; j < part_blocks; ++j) {
          float(&to)[4] = sums[p * part_blocks + j];
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = fmaf(of_block[j][i], i < 2 ? low : high, to[i]);
        }
      }
      scale_b += g.scale_b_k;
    }
    store_strip(epilogue, sums, t.expert, t.row + row_in_tile, t.rows_end, tile_columns(epilogue, t.n_block, block_n),
                [](int j) { return j; });
  }
}

template <class A, class B, int block_n>
__global__ void __launch_bounds__(gemm_threads, 1)
    m_fp8_kernel(MGroupedFp8 g, const __grid_constant__ CUtensorMap a_map,
                 const __grid_constant__ CUtensorMap a_scale_map, const __grid_constant__ CUtensorMap b_map) {
  const Stages<block_n> stages{dynamic_shared()};
  if (threadIdx.x == 0) {
    prefetch_map(a_map);
    prefetch_map(a_scale_map);
    prefetch_map(b_map);
    stages.ring().init(1, math_threads / warp_size);
  }
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    give_registers<40>();
    if (threadIdx.x == 0) load<block_n>(g, a_map, a_scale_map, b_map, stages);
    if (threadIdx.x >= warp_size) zero<block_n>(g);
  } else {
    take_registers<232>();
    multiply<A, B, block_n>(g, stages);
  }
}

template <class A, class B, int block_n>
void start(const MGroupedFp8& g, int64_t blocks, Stream stream) {
  const char* op = "gemm_m_grouped_fp8";
  const CUtensorMap a_map = encode(op, map_of_rows(static_cast<const A*>(g.a), g.rows, g.k, block_m)),
                    a_scale_map = encode(op, map_of_scales(g.scale_a, g.k / fp8_block, g.scale_a_ld, block_m)),
                    b_map = encode(op, map_along_k(static_cast<const B*>(g.b), g.experts, g.n, g.k, 1, block_n));
  launch_with_shared(op, stream, blocks, gemm_threads, Stages<block_n>::all_bytes, m_fp8_kernel<A, B, block_n>, g, a_map,
                     a_scale_map, b_map);
}

}  // namespace

void gemm_m_grouped_fp8(const MGroupedFp8& g, int multiprocessors, Stream stream) {
  const GemmConfig config = m_grouped_config(g.rows, g.experts, g.n, multiprocessors);
  with_operands(g.a_format, g.b_format, [&](auto a, auto b) {
    using A = decltype(a);
    using B = decltype(b);
    config.block_n == 128 ? start<A, B, 128>(g, config.blocks, stream) : start<A, B, 256>(g, config.blocks, stream);
  });
}

}  // namespace xt::cuda::sm90
