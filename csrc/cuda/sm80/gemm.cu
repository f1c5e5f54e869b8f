// bfloat16 grouped products by mma.sync with tiles copied in the background: GPUs of compute capability 8.x, and later
// ones that have no kernels of their own. Blocks are persistent: 8 warps compute tiles of 128 x 128, each 32 x 64.
#include "cuda/gemm.h"
#include "cuda/gemm_epilogue.h"
#include "cuda/heuristics.h"
#include "cuda/sm80/ptx.h"

namespace xt::cuda::sm80 {
namespace {

constexpr int tile = 128;                      // rows and columns
constexpr int depth = 32;                      // of k per stage
constexpr int stages = 4;
constexpr int operand_bytes = tile * depth * 2;
constexpr int stage_bytes = 2 * operand_bytes;
constexpr int shared_bytes = stages * stage_bytes + shared_slack;
constexpr int warps_n = 2;
constexpr int strips = 2, blocks = 8;          // of a warp: 16 rows, 8 columns each
constexpr int unit = 8;                        // elements that one copy moves
constexpr int copies = tile * depth / unit / block_threads;

// An operand's tile in shared memory, 16-byte units of it permuted so that neither copies nor ldmatrix meet bank
// conflicts. Along k: 128 lines (of m or n) of 32 k. Else: 32 lines (of k) of 128 m or n.
template <bool along_k>
struct Tile {
  static constexpr int line_units = along_k ? depth / unit : tile / unit;

  static __device__ uint32_t address(uint32_t base, int line, int at) {
    const int swizzled = along_k ? at ^ (line >> 1 & 3) : at ^ (line & 7);
    return base + static_cast<uint32_t>((line * line_units + swizzled) * 16);
  }
};

// Where an operand comes from. `lines` counts m or n along k, else k; `elements` those of a line.
struct Source {
  const bf16_t* data;
  int64_t line_length;      // elements from one line to the next
  int64_t lines, elements;  // that exist from `data` on: further ones are zero
  RowMap map = {};          // of lines
  int64_t first_row = 0;    // of the map
  int64_t gap = 0;          // elements from the first half of the tile's m or n to its second half; 0: one run
};

// The copies of one thread: which lines and units. Lines along k stay the same for all stages of a tile.
template <bool along_k>
class Loader {
 public:
  __device__ Loader(const Source& from, uint64_t* fault) : from_(from), fault_(fault) {
    if constexpr (along_k) {
#pragma unroll
      for (int j = 0; j < copies; ++j) start_[j] = start_of(line(j));
    }
  }

  // Stage k0 of the tile.
  __device__ void copy(uint32_t base, int64_t k0) const {
    const int at = static_cast<int>(threadIdx.x) % T::line_units;
    const bool second = !along_k && from_.gap && at >= T::line_units / 2;
    const int64_t element = (along_k ? k0 : 0) + (second ? at - T::line_units / 2 : at) * unit;
#pragma unroll
    for (int j = 0; j < copies; ++j) {
      const bf16_t* start = along_k ? start_[j] : start_of(k0 + line(j));
      const bool real = start && element < from_.elements;
      copy_async(T::address(base, line(j), at), real ? start + element + (second ? from_.gap : 0) : from_.data, real);
    }
  }

 private:
  using T = Tile<along_k>;
  static __device__ int line(int j) { return (static_cast<int>(threadIdx.x) + j * block_threads) / T::line_units; }
  __device__ const bf16_t* start_of(int64_t line) const {
    const bool second = along_k && from_.gap && line >= tile / 2;
    if (second) line -= tile / 2;
    if (line >= from_.lines) return nullptr;
    const int64_t at = from_.map.line(from_.first_row + line, fault_);
    if (at < 0) return nullptr;
    return from_.data + (from_.map.src ? at : line) * from_.line_length + (second ? from_.gap : 0);
  }

  const Source& from_;
  uint64_t* fault_;
  const bf16_t* start_[copies] = {};
};

// Block j of a warp's columns, as a block of the tile. Paired: 4 of gate, then the same 4 of up.
struct BlockOf {
  int warp_n;
  bool paired;
  __device__ int operator()(int j) const {
    return paired ? warp_n * 4 + j % 4 + j / 4 * (tile / 16) : warp_n * blocks + j;
  }
};

// sums += the stage's product. m0: the warp's first row.
template <bool a_along_k, bool b_along_k>
__device__ void multiply_stage(uint32_t a_tile, uint32_t b_tile, int m0, const BlockOf& block_of,
                               float (&sums)[strips][blocks][4]) {
  const int matrix = lane() / 8, in_matrix = lane() % 8;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[strips][4];
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      // Matrices: rows 0-7 and 8-15 of k 0-7, then of k 8-15.
      const int m = m0 + 16 * s + matrix % 2 * 8, k_at = k + matrix / 2 * 8;
      if constexpr (a_along_k) {
        load_matrices<false>(a[s], Tile<true>::address(a_tile, m + in_matrix, k_at / unit));
      } else {
        load_matrices<true>(a[s], Tile<false>::address(a_tile, k_at + in_matrix, m / unit));
      }
    }
#pragma unroll
    for (int j = 0; j < blocks; j += 2) {
      // Matrices: k 0-7 and 8-15 of one block of columns, then of the next.
      const int n = 8 * (block_of(j) + matrix / 2), k_at = k + matrix % 2 * 8;
      uint32_t b[4];
      if constexpr (b_along_k) {
        load_matrices<false>(b, Tile<true>::address(b_tile, n + in_matrix, k_at / unit));
      } else {
        load_matrices<true>(b, Tile<false>::address(b_tile, k_at + in_matrix, n / unit));
      }
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        mma_bf16(sums[s][j], a[s], b[0], b[1]);
        mma_bf16(sums[s][j + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// The 16-row strips of one warp, and the columns of its blocks.
struct WarpPlace {
  int m0;
  BlockOf block_of;

  __device__ explicit WarpPlace(bool paired)
      : m0(static_cast<int>(threadIdx.x) / warp_size / warps_n * strips * 16),
        block_of{static_cast<int>(threadIdx.x) / warp_size % warps_n, paired} {}
};

// All stages of a tile.
template <bool a_along_k, bool b_along_k>
__device__ void multiply_tile(uint32_t shared, const Loader<a_along_k>& a, const Loader<b_along_k>& b, int64_t num_k,
                              const WarpPlace& warp, float (&sums)[strips][blocks][4]) {
  const int64_t count = ceil_div(num_k, depth);
  const auto load = [&](int64_t i) {
    const uint32_t stage = shared + static_cast<uint32_t>(i % stages) * stage_bytes;
    if (i < count) {
      a.copy(stage, i * depth);
      b.copy(stage + operand_bytes, i * depth);
    }
    copy_async_commit();  // even if empty: waits count groups
  };
  __syncthreads();  // nobody reads the last tile's stages any more
  for (int i = 0; i < stages - 1; ++i) load(i);
  for (int64_t i = 0; i < count; ++i) {
    copy_async_wait<stages - 2>();
    __syncthreads();  // stage i is there for all, and stage i - 1 free
    load(i + stages - 1);
    const uint32_t stage = shared + static_cast<uint32_t>(i % stages) * stage_bytes;
    multiply_stage<a_along_k, b_along_k>(stage, stage + operand_bytes, warp.m0, warp.block_of, sums);
  }
}

template <bool b_along_k, bool dswiglu = false>
__global__ void __launch_bounds__(block_threads, 1) m_kernel(MGrouped g) {
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  const uint32_t shared = dynamic_shared();
  const bool paired = g.paired();
  constexpr int widening = dswiglu ? 2 : 1;  // columns of the output for each of the product
  const int64_t tile_n = paired ? tile / 2 : tile, num_n = paired ? g.n / 2 : g.n;
  const WarpPlace warp(paired);
  MTiles tiles(g.offsets, g.experts, g.rows, tile, ceil_div(num_n, tile_n), blockIdx.x, gridDim.x);
  for (MTile t; tiles.next(t);) {
    const TileColumns columns = tile_columns(g.epilogue, t.n_block, widening * tile);
    if (t.expert == g.experts) {
      const int64_t end = min(t.rows_end, t.row + tile);
      zero_tile(g.epilogue, t.row, end, columns, widening * tile / 8, static_cast<int>(threadIdx.x), block_threads);
      continue;
    }
    const int64_t n = t.n_block * tile_n, used_n = num_n - n, rows = t.rows_end - t.row;
    const auto* a = static_cast<const bf16_t*>(g.a) + (g.map.src ? 0 : t.row * g.k);
    const auto* b = static_cast<const bf16_t*>(g.b) + t.expert * g.n * g.k + (b_along_k ? n * g.k : n);
    const Source a_from = {a, g.k, rows, g.k, g.map, t.row};
    const Source b_from = b_along_k ? Source{b, g.k, used_n, g.k, {}, 0, paired ? num_n * g.k : 0}
                                    : Source{b, g.n, g.k, used_n, {}, 0, paired ? num_n : 0};
    float sums[strips][blocks][4] = {};
    multiply_tile<true, b_along_k>(shared, Loader<true>(a_from, g.fault), Loader<b_along_k>(b_from, g.fault), g.k, warp,
                                   sums);
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      const int64_t row = t.row + warp.m0 + 16 * s;
      if constexpr (dswiglu) {
        const int64_t part = t.n_block * warps_n + warp.block_of.warp_n;
        store_dswiglu(g.epilogue, sums[s], row, t.rows_end, columns, part, warp.block_of);
      } else {
        store_strip(g.epilogue, sums[s], t.expert, row, t.rows_end, columns, warp.block_of);
      }
    }
  }
}

__global__ void __launch_bounds__(block_threads, 1) k_kernel(KGrouped g) {
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  const uint32_t shared = dynamic_shared();
  const WarpPlace warp(false);
  KTiles tiles(g.offsets, g.experts, g.rows, ceil_div(g.m, tile), ceil_div(g.n, tile), blockIdx.x, gridDim.x);
  for (KTile t; tiles.next(t);) {
    const int64_t num_k = t.end - t.begin, m = t.m_block * tile, n = t.n_block * tile;
    if (num_k == 0 && g.epilogue.accumulate) continue;
    const auto* a = static_cast<const bf16_t*>(g.a) + t.begin * g.m + m;
    const auto* b = static_cast<const bf16_t*>(g.b) + (g.map.src ? 0 : t.begin * g.n) + n;
    const Source a_from = {a, g.m, num_k, g.m - m}, b_from = {b, g.n, num_k, g.n - n, g.map, t.begin};
    float sums[strips][blocks][4] = {};
    const Loader<false> load_a(a_from, g.fault), load_b(b_from, g.fault);
    multiply_tile<false, false>(shared, load_a, load_b, num_k, warp, sums);
    const TileColumns columns = tile_columns(g.epilogue, t.n_block, tile);
    const int64_t first_row = t.expert * g.m;
#pragma unroll
    for (int s = 0; s < strips; ++s) {
      const int64_t row = first_row + m + warp.m0 + 16 * s;
      store_strip(g.epilogue, sums[s], t.expert, row, first_row + g.m, columns, warp.block_of);
    }
  }
}

}  // namespace

void gemm_m_grouped(const MGrouped& g, int multiprocessors, Stream stream) {
  const int64_t n_blocks = ceil_div(g.paired() ? g.n / 2 : g.n, g.paired() ? tile / 2 : tile);
  const int64_t tiles = most_m_tiles(g.rows, g.experts, tile, n_blocks);
  launch_with_shared("gemm_m_grouped", stream, std::min<int64_t>(tiles, multiprocessors),
                     block_threads, shared_bytes, g.trans_b ? m_kernel<true> : m_kernel<false>, g);
}

static_assert(blocks * 8 == dot_columns);
void gemm_m_grouped_dswiglu(const MGrouped& g, int multiprocessors, Stream stream) {
  const int64_t tiles = most_m_tiles(g.rows, g.experts, tile, ceil_div(g.n, tile));
  launch_with_shared("gemm_m_grouped_dswiglu", stream, std::min<int64_t>(tiles, multiprocessors), block_threads,
                     shared_bytes, m_kernel<false, true>, g);
}

void gemm_k_grouped(const KGrouped& g, int multiprocessors, Stream stream) {
  const int64_t tiles = g.experts * ceil_div(g.m, tile) * ceil_div(g.n, tile);
  launch_with_shared("gemm_k_grouped", stream, std::min<int64_t>(tiles, multiprocessors),
                     block_threads, shared_bytes, k_kernel, g);
}

}  // namespace xt::cuda::sm80
