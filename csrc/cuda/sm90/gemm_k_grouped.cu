// bfloat16 weight gradients on Hopper, out[e] = a_e^T b_e: as gemm_m_grouped.cu, but both operands lie along m and n in
// memory and k runs over an expert's rows. The last stage of an expert may hold rows of the next one, whose products
// must not be added: the warpgroups that multiply zero them first.
#include "cuda/gemm.h"
#include "cuda/gemm_epilogue.h"
#include "cuda/heuristics.h"
#include "cuda/sm90/gemm_tile.h"
#include "cuda/sm90/tensor_map.h"

namespace xt::cuda::sm90 {
namespace {

template <int block_n>
__device__ KTiles tiles_of(const KGrouped& g) {
  return KTiles(g.offsets, g.experts, g.rows, ceil_div(g.m, block_m), ceil_div(g.n, block_n), blockIdx.x, gridDim.x);
}

// Columns [first, first + 64 * chunks) of rows [row, row + 64), by one thread.
template <int chunks>
__device__ void load_columns(uint32_t to, const CUtensorMap& map, uint32_t barrier, int64_t first, int64_t row) {
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    load_tile(to + static_cast<uint32_t>(c * chunk_bytes), map, barrier, static_cast<int>(first) + c * run,
              static_cast<int>(row));
  }
}

// By one thread.
template <int block_n>
__device__ void load_by_engine(const KGrouped& g, const CUtensorMap& a_map, const CUtensorMap& b_map, uint32_t shared,
                               const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  KTiles tiles = tiles_of<block_n>(g);
  Place<S::count> at;
  for (KTile t; tiles.next(t);) {
    for (int64_t row = t.begin; row < t.end; row += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes), full = ring.full(at.stage);
      ring.wait_empty(at);
      barrier_arrive_expect(full, S::bytes);
      load_columns<block_m / run>(a, a_map, full, t.m_block * block_m, row);
      load_columns<block_n / run>(a + S::a_bytes, b_map, full, t.n_block * block_n, row);
    }
  }
}

// By the warpgroup: neighbouring threads copy neighbouring columns of b's gathered rows.
template <int block_n>
__device__ void load_gathered(const KGrouped& g, const CUtensorMap& a_map, uint32_t shared,
                              const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  constexpr int units = block_n / 8, rows_apart = warpgroup / units, copies = block_k / rows_apart;
  const int thread = static_cast<int>(threadIdx.x), first = thread / units, unit = thread % units;
  const auto* data = static_cast<const bf16_t*>(g.b);
  KTiles tiles = tiles_of<block_n>(g);
  Place<S::count> at, arrived;
  int64_t started = 0;
  for (KTile t; tiles.next(t);) {
    const int64_t column = t.n_block * block_n + unit * 8;
    for (int64_t row = t.begin; row < t.end; row += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes), full = ring.full(at.stage);
      ring.wait_empty(at);
      if (thread == 0) {
        barrier_arrive_expect(full, S::a_bytes);
        load_columns<block_m / run>(a, a_map, full, t.m_block * block_m, row);
      }
      const uint32_t chunk = a + S::a_bytes + static_cast<uint32_t>(unit / 8 * chunk_bytes);
#pragma unroll
      for (int j = 0; j < copies; ++j) {
        const int line = first + j * rows_apart;
        const bool used = row + line < t.end && column < g.n;
        const int64_t from = used ? g.map.line(row + line, g.fault) : -1;
        copy_async(swizzled(chunk, line, unit % 8), from >= 0 ? data + from * g.n + column : data, from >= 0);
      }
      copy_async_commit();
      if (++started <= gather_delay) continue;
      gathered<gather_delay>(ring, arrived.stage);
      arrived.advance();
    }
  }
  last_gathered(ring, arrived, started);
}

// Rows from `used` on become zero in `chunks` chunks, for all threads that multiply.
__device__ __forceinline__ void zero_rows(uint32_t base, int chunks, int used, int thread) {
  const int units = (block_k - used) * 8;
  for (int i = thread; i < chunks * units; i += math_threads) {
    const int chunk = i / units, unit = i - chunk * units;
    store_zeros(base + static_cast<uint32_t>(chunk * chunk_bytes + used * 128 + unit * 16));
  }
  fence_proxy_async();
  sync_named<1, math_threads>();
}

// By a warpgroup that multiplies.
template <bool gather, int block_n>
__device__ void multiply(const KGrouped& g, uint32_t shared, const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  constexpr int blocks = block_n / 8, chunks = (gather ? block_m : block_m + block_n) / run;  // gathered: zero already
  const int thread = static_cast<int>(threadIdx.x) - warpgroup, group = thread / warpgroup;
  const int row_in_tile = thread / warp_size * 16;  // of this warp
  KTiles tiles = tiles_of<block_n>(g);
  Place<S::count> at;
  for (KTile t; tiles.next(t);) {
    const TileColumns columns = tile_columns(g.epilogue, t.n_block, block_n);
    const int64_t first = t.expert * g.m, end = first + g.m, tile_row = first + t.m_block * block_m;
    if (t.begin == t.end) {
      if (!g.epilogue.accumulate) {
        zero_tile(g.epilogue, tile_row, min(end, tile_row + block_m), columns, blocks, thread, math_threads);
      }
      continue;
    }
    float sums[blocks][4];
    int before = -1;  // stage whose product may still run
    for (int64_t row = t.begin; row < t.end; row += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes);
      ring.wait_full(at);
      if (row + block_k > t.end) zero_rows(a, chunks, static_cast<int>(t.end - row), thread);
      start_product<false, false>(a, a + S::a_bytes, group, row > t.begin, sums);
      wgmma_wait<1>();
      if (before >= 0) ring.release(before);
      before = at.stage;
    }
    wgmma_wait<0>();
    sums_ready(sums);
    ring.release(before);
    store_strip(g.epilogue, sums, t.expert, tile_row + row_in_tile, end, columns, [](int j) { return j; });
  }
}

template <bool gather, int block_n>
__global__ void __launch_bounds__(gemm_threads, 1)
    k_kernel(KGrouped g, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
  using S = Stage<block_n>;
  const uint32_t shared = dynamic_shared();
  const Ring<S::count> ring{shared + S::count * S::bytes};
  if (threadIdx.x == 0) {
    prefetch_map(a_map);
    if (!gather) prefetch_map(b_map);
    ring.init(gather ? warpgroup + 1 : 1, math_threads / warp_size);
  }
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    give_registers<gather ? 56 : 40>();
    if constexpr (gather) {
      load_gathered<block_n>(g, a_map, shared, ring);
    } else if (threadIdx.x == 0) {
      load_by_engine<block_n>(g, a_map, b_map, shared, ring);
    }
  } else {
    take_registers<gather ? 224 : 232>();
    multiply<gather, block_n>(g, shared, ring);
  }
}

template <bool gather, int block_n>
void start(const KGrouped& g, int64_t blocks, Stream stream) {
  const char* op = "gemm_k_grouped";
  const auto *a = static_cast<const bf16_t*>(g.a), *b = static_cast<const bf16_t*>(g.b);
  const CUtensorMap a_map = encode(op, map_of_rows(a, g.rows, g.m, block_k));
  const CUtensorMap b_map = gather ? a_map : encode(op, map_of_rows(b, g.rows, g.n, block_k));
  launch_with_shared(op, stream, blocks, gemm_threads, shared_bytes<block_n>, k_kernel<gather, block_n>, g, a_map,
                     b_map);
}

}  // namespace

void gemm_k_grouped(const KGrouped& g, int multiprocessors, Stream stream) {
  const GemmConfig config = k_grouped_config(g.experts, g.m, g.n, multiprocessors);
  if (g.map.src) {
    config.block_n == 128 ? start<true, 128>(g, config.blocks, stream) : start<true, 256>(g, config.blocks, stream);
  } else {
    config.block_n == 128 ? start<false, 128>(g, config.blocks, stream) : start<false, 256>(g, config.blocks, stream);
  }
}

}  // namespace xt::cuda::sm90
