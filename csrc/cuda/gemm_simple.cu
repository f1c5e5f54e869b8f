// Grouped products by plain multiply-adds: for float32, and for sizes whose rows the tensor-core kernels cannot load.
#include "cuda/gemm_simple.h"

namespace xt::cuda {
namespace {

using namespace simple;

constexpr int loads = tile * depth / block_threads;

// One operand of a tile: element (i, k) for lines [0, count) and k in [0, num_k), zero elsewhere.
template <class T>
struct Operand {
  const T* data;
  int64_t count, line, step;  // line: from one i to the next; step: from one k to the next
  RowMap map;                 // of i, or of k, from first_row on
  bool map_of_k;
  int64_t first_row;

  __device__ float get(int64_t i, int64_t k, int64_t num_k, uint64_t* fault) const {
    if (i >= count || k >= num_k) return 0.0f;
    int64_t at_line = i, at_k = k;
    if (map.src) {
      const int64_t mapped = map.line(first_row + (map_of_k ? k : i), fault);
      if (mapped < 0) return 0.0f;
      (map_of_k ? at_k : at_line) = mapped;
    }
    return widen(data[at_line * line + at_k * step]);
  }
};

// Neighbouring threads load what is neighbouring in memory.
template <class T>
__device__ void load(const Operand<T>& from, int64_t k0, int64_t num_k, float (&to)[depth][tile + 1], uint64_t* fault) {
#pragma unroll
  for (int j = 0; j < loads; ++j) {
    const int at = static_cast<int>(threadIdx.x) + j * block_threads;
    const int i = from.step == 1 ? at / depth : at % tile, k = from.step == 1 ? at % depth : at / tile;
    to[k][i] = from.get(i, k0 + k, num_k, fault);
  }
}

template <class T>
__device__ void multiply(const Operand<T>& a, const Operand<T>& b, int64_t num_k, float (&sums)[each][each],
                         uint64_t* fault) {
  __shared__ float a_tile[depth][tile + 1], b_tile[depth][tile + 1];
  for (int64_t k0 = 0; k0 < num_k; k0 += depth) {
    load(a, k0, num_k, a_tile, fault);
    load(b, k0, num_k, b_tile, fault);
    __syncthreads();
    add_products(a_tile, b_tile, sums);
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(block_threads) simple_m_kernel(MGrouped g) {
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  MTiles tiles(g.offsets, g.experts, g.rows, tile, ceil_div(g.n, tile), blockIdx.x, gridDim.x);
  for (MTile t; tiles.next(t);) {
    const bool unused = t.expert == g.experts;
    const int64_t rows = t.rows_end - t.row, col = t.n_block * tile;
    float sums[each][each] = {};
    if (!unused) {
      const T* a_data = static_cast<const T*>(g.a) + (g.map.src ? 0 : t.row * g.k);
      const T* b_data = static_cast<const T*>(g.b) + t.expert * g.n * g.k + (g.trans_b ? col * g.k : col);
      const Operand<T> a = {a_data, rows, g.k, 1, g.map, false, t.row};
      const Operand<T> b = {b_data, g.n - col, g.trans_b ? g.k : 1, g.trans_b ? 1 : g.n, {}, false, 0};
      multiply(a, b, g.k, sums, g.fault);
    }
    store(g.epilogue, sums, t.expert, unused, t.row, rows, col);
  }
}

template <class T>
__global__ void __launch_bounds__(block_threads) simple_k_kernel(KGrouped g) {
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  KTiles tiles(g.offsets, g.experts, g.rows, ceil_div(g.m, tile), ceil_div(g.n, tile), blockIdx.x, gridDim.x);
  for (KTile t; tiles.next(t);) {
    const int64_t num_k = t.end - t.begin, i = t.m_block * tile, j = t.n_block * tile;
    if (num_k == 0 && g.epilogue.accumulate) continue;
    float sums[each][each] = {};
    const Operand<T> a = {static_cast<const T*>(g.a) + t.begin * g.m + i, g.m - i, 1, g.m, {}, true, 0};
    const T* b_data = static_cast<const T*>(g.b) + (g.map.src ? 0 : t.begin * g.n) + j;
    const Operand<T> b = {b_data, g.n - j, 1, g.n, g.map, true, t.begin};
    multiply(a, b, num_k, sums, g.fault);
    store(g.epilogue, sums, t.expert, false, t.expert * g.m + i, g.m - i, j);
  }
}

}  // namespace

void simple_m_grouped(const MGrouped& g, DType dtype, Stream stream) {
  const int64_t blocks = (g.rows / tile + std::min(g.experts + 1, g.rows)) * ceil_div(g.n, tile);
  const auto kernel = dtype == DType::f32 ? simple_m_kernel<float> : simple_m_kernel<bf16_t>;
  launch("gemm_m_grouped", stream, blocks, block_threads, kernel, g);
}

void simple_k_grouped(const KGrouped& g, DType dtype, Stream stream) {
  const int64_t blocks = g.experts * ceil_div(g.m, tile) * ceil_div(g.n, tile);
  const auto kernel = dtype == DType::f32 ? simple_k_kernel<float> : simple_k_kernel<bf16_t>;
  launch("gemm_k_grouped", stream, blocks, block_threads, kernel, g);
}

}  // namespace xt::cuda
