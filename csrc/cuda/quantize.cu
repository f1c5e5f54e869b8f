#include "cuda/cuda.h"
#include "cuda/fp8.h"

namespace xt::cuda {
namespace {

constexpr int per_lane = 4;

// The lanes of a block of 128 columns (16 of bfloat16, 32 of float32) find its scale together, from registers.
template <class T, class F>
__global__ void __launch_bounds__(block_threads)
    quantize_rows_kernel(const uint4* __restrict__ x, UsedRows used_rows, ScaleRule rule,
                         typename Codes<wide<T>>::Bits* __restrict__ q, float* __restrict__ scale, int64_t ld,
                         RowTiles<per_lane> tiles, uint64_t* fault) {
  constexpr int N = wide<T>, lanes = fp8_block / N;
  const int64_t used = used_rows.get(fault);
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const bool live = tile.row < used;
    const int left = tiles.left(tile);
    const uint4* in = x + tile.row * tiles.units + tile.begin;
    uint4 bits[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (live && j * warp_size < left) bits[j] = __ldg(in + j * warp_size);
    }
    auto* to = q + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      float v[N];
      Access<T, N>::widen(bits[j], v);
      uint32_t largest = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) largest = max(largest, magnitude(v[n]));
      const float s = rule.scale<F>(largest_of_lanes<lanes>(largest));
      if (j * warp_size >= left) continue;
      to[j * warp_size] = live ? quantize<F, N>(v, s) : typename Codes<N>::Bits{};
      if (lane() % lanes != 0) continue;
      float* row = scale + (tile.begin + j * warp_size) / lanes * ld;
      row[tile.row] = live ? s : 0.0f;
      if (tile.row + 1 < tiles.rows) continue;
#pragma unroll 1
      for (int64_t r = tiles.rows; r < ld; ++r) row[r] = 0.0f;
    }
  }
}

// Where the scale of row r and block of columns b lies: at r / rows_per_scale * row + b * col.
struct ScaleStrides {
  uint32_t rows_per_scale;
  int64_t row, col;
};

template <class T, class F>
__global__ void __launch_bounds__(block_threads)
    dequantize_kernel(const typename Codes<wide<T>>::Bits* __restrict__ q, const float* __restrict__ scale,
                      ScaleStrides strides, uint4* __restrict__ out, RowTiles<per_lane> tiles) {
  constexpr int N = wide<T>, lanes = fp8_block / N;
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const int left = tiles.left(tile);
    const auto* in = q + tile.row * tiles.units + tile.begin;
    const float* scales = scale + tile.row / strides.rows_per_scale * strides.row;
    typename Codes<N>::Bits bits[per_lane] = {};
    float s[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size >= left) continue;
      bits[j] = __ldg(in + j * warp_size);
      s[j] = __ldg(scales + (tile.begin + j * warp_size) / lanes * strides.col);
    }
    uint4* to = out + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      uint32_t words[N / 4];
      Codes<N>::words(bits[j], words);
      float v[N];
#pragma unroll
      for (int w = 0; w < N / 4; ++w) decode_word<F>(words[w], v + 4 * w);
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] *= s[j];
      if (j * warp_size < left) to[j * warp_size] = Access<T, N>::narrow(v);
    }
  }
}

}  // namespace

void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    Stream stream) {
  const OnDevice guard("quantize_1x128", x);
  with_formats(x.dtype, q.dtype, [&](auto element, auto format) {
    using T = decltype(element);
    using F = decltype(format);
    const RowTiles<per_lane> tiles(x.shape[0], x.shape[1] / wide<T>);
    launch("quantize_1x128", stream, blocks_of_warps(tiles.count()), block_threads, quantize_rows_kernel<T, F>,
           x.ptr<uint4>(), UsedRows(offsets, x.shape[0]), ScaleRule(params), q.ptr<typename Codes<wide<T>>::Bits>(),
           scale.ptr<float>(), scale.shape[1], tiles, stream.fault);
  });
}

void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, Stream stream) {
  const OnDevice guard("dequantize", q);
  const bool squares = q.ndim == 3;
  const int64_t hidden = q.shape[q.ndim - 1], rows = squares ? q.shape[0] * q.shape[1] : q.shape[0];
  const ScaleStrides strides = squares ? ScaleStrides{fp8_block, hidden / fp8_block, 1}
                                       : ScaleStrides{1, 1, scale.shape[1]};
  with_formats(out.dtype, q.dtype, [&](auto element, auto format) {
    using T = decltype(element);
    using F = decltype(format);
    const RowTiles<per_lane> tiles(rows, hidden / wide<T>);
    launch("dequantize", stream, blocks_of_warps(tiles.count()), block_threads, dequantize_kernel<T, F>,
           q.ptr<typename Codes<wide<T>>::Bits>(), scale.ptr<float>(), strides, out.ptr<uint4>(), tiles);
  });
}

}  // namespace xt::cuda
