// bfloat16 products of ragged groups of rows on Hopper. A block is persistent: one warpgroup loads tiles through the
// ring, by the copy engine or, where rows are gathered, its 128 threads; two multiply them, 64 rows each, and write
// their rows out on their own, so that one can write while the other still multiplies. Groups are not padded: a tile may
// load rows of the next expert, whose sums are not written.
#include "cuda/gemm.h"
#include "cuda/gemm_epilogue.h"
#include "cuda/heuristics.h"
#include "cuda/sm90/gemm_tile.h"
#include "cuda/sm90/tensor_map.h"

namespace xt::cuda::sm90 {
namespace {

template <int block_n>
struct Tiling {
  bool paired;
  int64_t tile_n, num_n;  // columns of a tile and of the product; paired: of gate

  XT_BOTH explicit Tiling(const MGrouped& g)
      : paired(g.paired()), tile_n(paired ? block_n / 2 : block_n), num_n(paired ? g.n / 2 : g.n) {}
  XT_BOTH int64_t n_blocks() const { return ceil_div(num_n, tile_n); }
  __device__ MTiles tiles(const MGrouped& g) const {
    return MTiles(g.offsets, g.experts, g.rows, block_m, n_blocks(), blockIdx.x, gridDim.x);
  }
};

// b's part of a stage, by one thread.
template <bool trans_b, int block_n>
__device__ void load_b(uint32_t to, const CUtensorMap& b_map, uint32_t barrier, const Tiling<block_n>& tiling,
                       const MTile& t, int k) {
  const int n = static_cast<int>(t.n_block * tiling.tile_n), e = static_cast<int>(t.expert);
  if constexpr (trans_b) {
    load_tile(to, b_map, barrier, k, n, 0, e);
  } else {
    constexpr int chunks = block_n / run;
    const int per_half = tiling.paired ? chunks / 2 : chunks;
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int half = c >= per_half;
      const int column = n + (c - half * per_half) * run;
      load_tile(to + static_cast<uint32_t>(c * chunk_bytes), b_map, barrier, column, half, k, e);
    }
  }
}

// By one thread.
template <bool trans_b, int block_n>
__device__ void load_by_engine(const MGrouped& g, const CUtensorMap& a_map, const CUtensorMap& b_map, uint32_t shared,
                               const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  const Tiling<block_n> tiling(g);
  MTiles tiles = tiling.tiles(g);
  Place<S::count> at;
  for (MTile t; tiles.next(t);) {
    if (t.expert == g.experts) continue;
    for (int k = 0; k < g.k; k += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes), full = ring.full(at.stage);
      ring.wait_empty(at);
      barrier_arrive_expect(full, S::bytes);
      load_tile(a, a_map, full, k, static_cast<int>(t.row));
      load_b<trans_b>(a + S::a_bytes, b_map, full, tiling, t, k);
    }
  }
}

// By the warpgroup: 8 neighbouring threads copy a line of 64 k of one row; rows of a stage are 16 apart.
template <bool trans_b, int block_n>
__device__ void load_gathered(const MGrouped& g, const CUtensorMap& b_map, uint32_t shared,
                              const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  constexpr int units = 8, rows_apart = warpgroup / units, copies = block_m / rows_apart;
  const Tiling<block_n> tiling(g);
  const int thread = static_cast<int>(threadIdx.x), first = thread / units, unit = thread % units;
  const auto* data = static_cast<const bf16_t*>(g.a);
  MTiles tiles = tiling.tiles(g);
  Place<S::count> at, arrived;
  int64_t started = 0;
  for (MTile t; tiles.next(t);) {
    if (t.expert == g.experts) continue;
    int32_t line[copies];
#pragma unroll
    for (int j = 0; j < copies; ++j) {
      const int64_t row = t.row + first + j * rows_apart;
      line[j] = row < t.rows_end ? static_cast<int32_t>(g.map.line(row, g.fault)) : -1;
    }
    for (int k = 0; k < g.k; k += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes), full = ring.full(at.stage);
      ring.wait_empty(at);
      if (thread == 0) {
        barrier_arrive_expect(full, S::b_bytes);
        load_b<trans_b>(a + S::a_bytes, b_map, full, tiling, t, k);
      }
      const int mine = k + unit * 8;
#pragma unroll
      for (int j = 0; j < copies; ++j) {
        const bool real = line[j] >= 0 && mine < g.k;
        copy_async(swizzled(a, first + j * rows_apart, unit), real ? data + line[j] * g.k + mine : data, real);
      }
      copy_async_commit();
      if (++started <= gather_delay) continue;
      gathered<gather_delay>(ring, arrived.stage);
      arrived.advance();
    }
  }
  last_gathered(ring, arrived, started);
}

// By a warpgroup that multiplies.
template <bool trans_b, bool dswiglu, int block_n>
__device__ void multiply(const MGrouped& g, uint32_t shared, const Ring<Stage<block_n>::count>& ring) {
  using S = Stage<block_n>;
  constexpr int blocks = block_n / 8, widening = dswiglu ? 2 : 1;  // columns of the output for each of the product
  const int thread = static_cast<int>(threadIdx.x) - warpgroup, group = thread / warpgroup;
  const int row_in_tile = thread / warp_size * 16;  // of this warp
  MTiles tiles = Tiling<block_n>(g).tiles(g);
  Place<S::count> at;
  for (MTile t; tiles.next(t);) {
    const TileColumns columns = tile_columns(g.epilogue, t.n_block, widening * block_n);
    if (t.expert == g.experts) {
      const int64_t end = min(t.rows_end, t.row + block_m);
      zero_tile(g.epilogue, t.row, end, columns, widening * blocks, thread, math_threads);
      continue;
    }
    float sums[blocks][4];
    int before = -1;  // stage whose product may still run
    for (int k = 0; k < g.k; k += block_k, at.advance()) {
      const uint32_t a = shared + static_cast<uint32_t>(at.stage * S::bytes);
      ring.wait_full(at);
      start_product<true, trans_b>(a, a + S::a_bytes, group, k > 0, sums);
      wgmma_wait<1>();
      if (before >= 0) ring.release(before);
      before = at.stage;
    }
    wgmma_wait<0>();
    sums_ready(sums);
    ring.release(before);
    const auto block_of = [](int j) { return j; };
    if constexpr (dswiglu) {
      store_dswiglu(g.epilogue, sums, t.row + row_in_tile, t.rows_end, columns, t.n_block, block_of);
    } else {
      store_strip(g.epilogue, sums, t.expert, t.row + row_in_tile, t.rows_end, columns, block_of);
    }
  }
}

template <bool trans_b, bool gather, bool dswiglu, int block_n>
__global__ void __launch_bounds__(gemm_threads, 1)
    m_kernel(MGrouped g, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map) {
  using S = Stage<block_n>;
  const uint32_t shared = dynamic_shared();
  const Ring<S::count> ring{shared + S::count * S::bytes};
  if (threadIdx.x == 0) {
    if (!gather) prefetch_map(a_map);
    prefetch_map(b_map);
    ring.init(gather ? warpgroup + 1 : 1, math_threads / warp_size);
  }
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  __syncthreads();
  if (threadIdx.x < warpgroup) {
    give_registers<gather ? 56 : 40>();
    if constexpr (gather) {
      load_gathered<trans_b, block_n>(g, b_map, shared, ring);
    } else if (threadIdx.x == 0) {
      load_by_engine<trans_b, block_n>(g, a_map, b_map, shared, ring);
    }
  } else {
    take_registers<gather ? 224 : 232>();
    multiply<trans_b, dswiglu, block_n>(g, shared, ring);
  }
}

template <bool trans_b, bool gather, bool dswiglu, int block_n>
void start(const MGrouped& g, int64_t blocks, Stream stream) {
  const char* op = dswiglu ? "gemm_m_grouped_dswiglu" : "gemm_m_grouped";
  const auto *a = static_cast<const bf16_t*>(g.a), *b = static_cast<const bf16_t*>(g.b);
  const int halves = g.paired() ? 2 : 1;
  const CUtensorMap b_map = encode(op, trans_b ? map_along_k(b, g.experts, g.n, g.k, halves, block_n)
                                               : map_along_n(b, g.experts, g.k, g.n, halves, block_k));
  const CUtensorMap a_map = gather ? b_map : encode(op, map_of_rows(a, g.rows, g.k, block_m));
  launch_with_shared(op, stream, blocks, gemm_threads, shared_bytes<block_n>,
                     m_kernel<trans_b, gather, dswiglu, block_n>, g, a_map, b_map);
}

template <bool trans_b, bool gather>
void start(const MGrouped& g, int multiprocessors, Stream stream) {
  const GemmConfig config = m_grouped_config(g.rows, g.experts, g.n, multiprocessors);
  config.block_n == 128 ? start<trans_b, gather, false, 128>(g, config.blocks, stream)
                        : start<trans_b, gather, false, 256>(g, config.blocks, stream);
}

}  // namespace

void gemm_m_grouped(const MGrouped& g, int multiprocessors, Stream stream) {
  if (g.map.src) {
    g.trans_b ? start<true, true>(g, multiprocessors, stream) : start<false, true>(g, multiprocessors, stream);
  } else {
    g.trans_b ? start<true, false>(g, multiprocessors, stream) : start<false, false>(g, multiprocessors, stream);
  }
}

void gemm_m_grouped_dswiglu(const MGrouped& g, int multiprocessors, Stream stream) {
  start<false, false, true, dot_columns>(g, dswiglu_config(g.rows, g.experts, g.n, multiprocessors).blocks, stream);
}

}  // namespace xt::cuda::sm90
