// float8 weight gradients on Hopper: as gemm_m_grouped_fp8.cu, but k runs over an expert's columns, padded with zeros to
// whole blocks, and each column of the output has scales of its own.
#include "cuda/gemm_epilogue.h"
#include "cuda/sm90/gemm_fp8_tile.h"

namespace xt::cuda::sm90 {
namespace {

constexpr int block_n = part_n;
using Stages = Fp8Stages<block_n, true>;

struct Maps {
  CUtensorMap a, a_scale, b, b_scale;
};

__device__ PaddedKTiles tiles_of(const KGroupedFp8& g) {
  return PaddedKTiles(g.offsets, g.experts, g.columns, ceil_div(g.m, block_m), ceil_div(g.n, block_n), blockIdx.x,
                      gridDim.x);
}

// By one thread.
__device__ void load(const KGroupedFp8& g, const Maps& maps, const Stages& stages) {
  const auto ring = stages.ring();
  PaddedKTiles tiles = tiles_of(g);
  Place<Stages::count> at;
  for (KTile t; tiles.next(t);) {
    const int m = static_cast<int>(t.m_block * block_m), n = static_cast<int>(t.n_block * block_n);
    for (int k = static_cast<int>(t.begin); k < t.end; k += fp8_block, at.advance()) {
      const uint32_t full = ring.full(at.stage);
      ring.wait_empty(at);
      barrier_arrive_expect(full, Stages::bytes);
      load_tile(stages.a(at.stage), maps.a, full, k, m);
      load_tile(stages.b(at.stage), maps.b, full, k, n);
      load_tile(stages.a_scales(at.stage), maps.a_scale, full, m, k / fp8_block);
      load_tile(stages.b_scales(at.stage), maps.b_scale, full, n, k / fp8_block);
    }
  }
}

// Experts without rows, by the threads of the loading warpgroup that have nothing to load.
__device__ void zero(const KGroupedFp8& g) {
  if (g.epilogue.accumulate) return;
  const Epilogue epilogue = plain(g.epilogue);
  PaddedKTiles tiles = tiles_of(g);
  for (KTile t; tiles.next(t);) {
    if (t.begin < t.end) continue;
    const int64_t row = t.expert * g.m + t.m_block * block_m;
    zero_tile(epilogue, row, row + block_m, tile_columns(epilogue, t.n_block, block_n), block_n / 8,
              static_cast<int>(threadIdx.x) - warp_size, idle_threads);
  }
}

// By a warpgroup that multiplies.
template <class A, class B>
__device__ void multiply(const KGroupedFp8& g, const Stages& stages) {
  const auto ring = stages.ring();
  const int thread = static_cast<int>(threadIdx.x) - warpgroup, group = thread / warpgroup;
  const int row_in_tile = thread / warp_size * 16;  // of this warp
  const Epilogue epilogue = plain(g.epilogue);
  PaddedKTiles tiles = tiles_of(g);
  Place<Stages::count> at;
  for (KTile t; tiles.next(t);) {
    if (t.begin == t.end) continue;
    float sums[part_blocks][4] = {};
    for (int64_t k = t.begin; k < t.end; k += fp8_block, at.advance()) {
      ring.wait_full(at);
      const RowScales a_scales = RowScales::load(stages.a_scales(at.stage), row_in_tile);
      const uint32_t b_scales = stages.b_scales(at.stage) + static_cast<uint32_t>(8 * (lane() % 4));
      float of_block[part_blocks][4];
      multiply_block<A, B>(stages.a(at.stage), stages.b(at.stage), group, of_block);
#pragma unroll
      for (int j = 0; j < part_blocks; ++j) {
        float scales[2];  // of a lane's columns
        load_shared(b_scales + static_cast<uint32_t>(4 * 8 * j), scales);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[j][i] = fmaf(of_block[j][i], (i < 2 ? a_scales.low : a_scales.high) * scales[i % 2], sums[j][i]);
        }
      }
      __syncwarp();  // all lanes have their scales
      ring.release(at.stage);
    }
    const int64_t first = t.expert * g.m;
    store_strip(epilogue, sums, t.expert, first + t.m_block * block_m + row_in_tile, first + g.m,
                tile_columns(epilogue, t.n_block, block_n), [](int j) { return j; });
  }
}

template <class A, class B>
__global__ void __launch_bounds__(gemm_threads, 1) k_fp8_kernel(KGroupedFp8 g, const __grid_constant__ Maps maps) {
  const Stages stages{dynamic_shared()};
  if (threadIdx.x == 0) {
    prefetch_map(maps.a);
    prefetch_map(maps.b);
    prefetch_map(maps.a_scale);
    prefetch_map(maps.b_scale);
    stages.ring().init(1, math_threads / warp_size);
  }
  check_padded_offsets(g.offsets, g.experts, g.columns, g.fault);
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    give_registers<72>();
    if (threadIdx.x == 0) load(g, maps, stages);
    if (threadIdx.x >= warp_size) zero(g);
  } else {
    take_registers<216>();
    multiply<A, B>(g, stages);
  }
}

}  // namespace

void gemm_k_grouped_fp8(const KGroupedFp8& g, int multiprocessors, Stream stream) {
  const char* op = "gemm_k_grouped_fp8";
  const int64_t tiles = g.experts * ceil_div(g.m, block_m) * ceil_div(g.n, block_n), k_blocks = g.columns / fp8_block;
  with_operands(g.a_format, g.b_format, [&](auto a, auto b) {
    using A = decltype(a);
    using B = decltype(b);
    const Maps maps = {encode(op, map_of_rows(static_cast<const A*>(g.a), g.m, g.columns, block_m)),
                       encode(op, map_of_scales(g.scale_a, k_blocks, g.m, block_m)),
                       encode(op, map_of_rows(static_cast<const B*>(g.b), g.n, g.columns, block_n)),
                       encode(op, map_of_scales(g.scale_b, k_blocks, g.n, block_n))};
    launch_with_shared(op, stream, std::min<int64_t>(tiles, multiprocessors), gemm_threads, Stages::all_bytes,
                       k_fp8_kernel<A, B>, g, maps);
  });
}

}  // namespace xt::cuda::sm90
