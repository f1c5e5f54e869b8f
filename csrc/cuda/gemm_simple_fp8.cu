// float8 grouped products by plain multiply-adds on the decoded numbers, a block of 128 k at a time.
#include "cuda/gemm_fp8.h"
#include "cuda/gemm_simple.h"

namespace xt::cuda {
namespace {

using namespace simple;

constexpr int words = depth / 4;  // of 4 codes in a line of a stage: every thread loads one
static_assert(tile * words == block_threads);

// Lines along k of one operand of a tile, from its first block of k on, and their scales.
struct Lines {
  const void* codes;
  int64_t count, length;   // lines that exist, codes from one to the next
  const float* scales;
  int64_t scale_block, scale_line;  // scales from one block of k, or line, to the next

  template <class F>
  __device__ void load(int64_t k0, Stage& to) const {
    const int line = static_cast<int>(threadIdx.x) / words, k = static_cast<int>(threadIdx.x) % words * 4;
    float numbers[4] = {};
    if (line < count) {
      decode_word<F>(*reinterpret_cast<const uint32_t*>(static_cast<const char*>(codes) + line * length + k0 + k),
                     numbers);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[k + i][line] = numbers[i];
  }
  // Of lines first, first + 16, ...
  __device__ void load_scales(int64_t block, int first, float (&to)[each]) const {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int line = first + i * side;
      to[i] = line < count ? scales[block * scale_block + line * scale_line] : 0.0f;
    }
  }
};

template <class A, class B>
__device__ void multiply(const Lines& a, const Lines& b, int64_t blocks, Sums& sums) {
  __shared__ Stage a_stage, b_stage;
  const int ti = threadIdx.x / side, tj = threadIdx.x % side;
  for (int64_t block = 0; block < blocks; ++block) {
    Sums of_block = {};
    for (int k = 0; k < fp8_block; k += depth) {
      a.load<A>(block * fp8_block + k, a_stage);
      b.load<B>(block * fp8_block + k, b_stage);
      __syncthreads();
      add_products(a_stage, b_stage, of_block);
      __syncthreads();
    }
    float scale_a[each], scale_b[each];
    a.load_scales(block, ti, scale_a);
    b.load_scales(block, tj, scale_b);
#pragma unroll
    for (int i = 0; i < each; ++i) {
#pragma unroll
      for (int j = 0; j < each; ++j) sums[i][j] = fmaf(of_block[i][j], scale_a[i] * scale_b[j], sums[i][j]);
    }
  }
}

template <class A, class B>
__global__ void __launch_bounds__(block_threads) simple_m_fp8_kernel(MGroupedFp8 g) {
  check_offsets(g.offsets, g.experts, g.rows, g.fault);
  MTiles tiles(g.offsets, g.experts, g.rows, tile, ceil_div(g.n, tile), blockIdx.x, gridDim.x);
  for (MTile t; tiles.next(t);) {
    const bool unused = t.expert == g.experts;
    const int64_t rows = t.rows_end - t.row, col = t.n_block * tile;
    Sums sums = {};
    if (!unused) {
      const Lines a = {static_cast<const char*>(g.a) + t.row * g.k, rows, g.k, g.scale_a + t.row, g.scale_a_ld, 1};
      const float* scale_b = g.scale_b + t.expert * g.scale_b_expert + col / fp8_block * g.scale_b_n;
      const Lines b = {static_cast<const char*>(g.b) + (t.expert * g.n + col) * g.k, g.n - col, g.k, scale_b,
                       g.scale_b_k, 0};
      multiply<A, B>(a, b, g.k / fp8_block, sums);
    }
    store(g.epilogue, sums, t.expert, unused, t.row, rows, col);
  }
}

template <class A, class B>
__global__ void __launch_bounds__(block_threads) simple_k_fp8_kernel(KGroupedFp8 g) {
  check_padded_offsets(g.offsets, g.experts, g.columns, g.fault);
  PaddedKTiles tiles(g.offsets, g.experts, g.columns, ceil_div(g.m, tile), ceil_div(g.n, tile), blockIdx.x, gridDim.x);
  for (KTile t; tiles.next(t);) {
    if (t.begin == t.end && g.epilogue.accumulate) continue;
    const int64_t i = t.m_block * tile, j = t.n_block * tile, first = t.begin / fp8_block;
    const auto lines = [&](const void* codes, const float* scales, int64_t line, int64_t count) {
      return Lines{static_cast<const char*>(codes) + line * g.columns + t.begin, count - line, g.columns,
                   scales + first * count + line, count, 1};
    };
    Sums sums = {};
    multiply<A, B>(lines(g.a, g.scale_a, i, g.m), lines(g.b, g.scale_b, j, g.n), ceil_div(t.end - t.begin, fp8_block),
                   sums);
    store(g.epilogue, sums, t.expert, false, t.expert * g.m + i, g.m - i, j);
  }
}

}  // namespace

void simple_m_grouped_fp8(const MGroupedFp8& g, Stream stream) {
  const int64_t blocks = (g.rows / tile + std::min(g.experts + 1, g.rows)) * ceil_div(g.n, tile);
  with_operands(g.a_format, g.b_format, [&](auto a, auto b) {
    launch("gemm_m_grouped_fp8", stream, blocks, block_threads, simple_m_fp8_kernel<decltype(a), decltype(b)>, g);
  });
}

void simple_k_grouped_fp8(const KGroupedFp8& g, Stream stream) {
  const int64_t blocks = g.experts * ceil_div(g.m, tile) * ceil_div(g.n, tile);
  with_operands(g.a_format, g.b_format, [&](auto a, auto b) {
    launch("gemm_k_grouped_fp8", stream, blocks, block_threads, simple_k_fp8_kernel<decltype(a), decltype(b)>, g);
  });
}

}  // namespace xt::cuda
