#include "cuda/cuda.h"
#include "cuda/maps.h"

namespace xt::cuda {
namespace {

__device__ float prob_of(const float* probs, int64_t choice) { return probs ? __ldg(probs + choice) : 1.0f; }

// Each warp sums some columns of one token in registers; the rows of `batch` choices are in flight together.
constexpr int per_lane = 2;
constexpr int batch = 4;

template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    unpermute_kernel(const typename Access<T, N>::Bits* __restrict__ y, Maps maps,
                     const float* __restrict__ probs, typename Access<T, N>::Bits* __restrict__ out,
                     RowTiles<per_lane> tiles, uint64_t* fault) {
  using A = Access<T, N>;
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const int64_t first = tile.row * maps.num_experts_per_tok, last = first + maps.num_experts_per_tok;
    const int left = tiles.left(tile);
    float sum[per_lane][N] = {};
    for (int64_t choice = first; choice < last; choice += batch) {
      int32_t row[batch];
      float p[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        row[b] = choice + b < last ? maps.row(choice + b, fault, Fault::unpermute_row_of) : -1;
        p[b] = row[b] >= 0 ? prob_of(probs, choice + b) : 0.0f;
      }
      typename A::Bits bits[batch][per_lane] = {};
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const auto* in = y + row[b] * tiles.units + tile.begin;
#pragma unroll
        for (int j = 0; j < per_lane; ++j) {
          if (row[b] >= 0 && j * warp_size < left) bits[b][j] = __ldg(in + j * warp_size);
        }
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        if (row[b] < 0) continue;
#pragma unroll
        for (int j = 0; j < per_lane; ++j) {
          float v[N];
          A::widen(bits[b][j], v);
#pragma unroll
          for (int n = 0; n < N; ++n) sum[j][n] = fmaf(p[b], v[n], sum[j][n]);
        }
      }
    }
    auto* to = out + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size < left) to[j * warp_size] = A::narrow(sum[j]);
    }
  }
}

__device__ float warp_sum(float v) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) v += __shfl_xor_sync(all_lanes, v, step);
  return v;
}

// One choice: dy row = p * dout row, and with `y` its dot product with dout. Returns this lane's part of the product.
// The K choices of a token lie in one block or two, so that dout comes from the first-level cache all but once.
template <class T, int N>
__device__ float scale_and_dot(const typename Access<T, N>::Bits* __restrict__ dout,
                               const typename Access<T, N>::Bits* __restrict__ y,
                               typename Access<T, N>::Bits* __restrict__ dy, int64_t units, float p) {
  using A = Access<T, N>;
  constexpr int ahead = 4;
  float dot[ahead] = {};
  for (int64_t begin = lane(); begin < units; begin += ahead * warp_size) {
    const int left = static_cast<int>(min(units - begin, int64_t{ahead * warp_size}));
    typename A::Bits d[ahead] = {}, r[ahead] = {};
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (j * warp_size >= left) continue;
      d[j] = __ldg(dout + begin + j * warp_size);
      if (y) r[j] = __ldg(y + begin + j * warp_size);
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      float dv[N], rv[N];
      A::widen(d[j], dv);
      A::widen(r[j], rv);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dot[j] = fmaf(dv[n], rv[n], dot[j]);
        dv[n] *= p;
      }
      if (j * warp_size < left) dy[begin + j * warp_size] = A::narrow(dv);
    }
  }
  return (dot[0] + dot[1]) + (dot[2] + dot[3]);
}

// Warps [0, T*K) take a choice each; those after them zero the rows that no choice owns.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    unpermute_bwd_kernel(const typename Access<T, N>::Bits* __restrict__ dout,
                         const typename Access<T, N>::Bits* __restrict__ y, Maps maps, const float* __restrict__ probs,
                         typename Access<T, N>::Bits* __restrict__ dy, float* __restrict__ dprobs, int64_t units,
                         uint64_t* fault) {
  for (int64_t i = grid_warp(); i < maps.choices + maps.row_groups(); i += grid_warps()) {
    if (i >= maps.choices) {
      zero_unowned(maps, i - maps.choices, dy, units, fault, Fault::unpermute_bwd_maps);
      continue;
    }
    const int64_t row = maps.row(i, fault, Fault::unpermute_bwd_maps);
    const int64_t token = static_cast<uint32_t>(i) / maps.num_experts_per_tok;  // T*K < 2^31, as src holds it
    float dot = 0;
    if (row >= 0) {
      dot = warp_sum(scale_and_dot<T, N>(dout + token * units, y ? y + row * units : nullptr, dy + row * units, units,
                                         prob_of(probs, i)));
    }
    if (dprobs && lane() == 0) dprobs[i] = dot;
  }
}

}  // namespace

void unpermute(const Tensor& y, const Tensor& row_of, const Tensor* probs, const Tensor& out, Stream stream) {
  const OnDevice guard("unpermute", y);
  with_access(y.dtype, y.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    using Unit = typename Access<T, n()>::Bits;
    const RowTiles<per_lane> tiles(out.shape[0], out.shape[1] / n());
    launch("unpermute", stream, blocks_of_warps(tiles.count()), block_threads, unpermute_kernel<T, n()>, y.ptr<Unit>(),
           Maps(row_of, nullptr, y.shape[0]), probs ? probs->ptr<float>() : nullptr, out.ptr<Unit>(), tiles,
           stream.fault);
  });
}

void unpermute_bwd(const Tensor& dout, const Tensor* y, const Tensor& src, const Tensor& row_of, const Tensor* probs,
                   const Tensor& dy, const Tensor* dprobs, Stream stream) {
  const OnDevice guard("unpermute_bwd", dout);
  const Maps maps(row_of, &src, dy.shape[0]);
  with_access(dout.dtype, dout.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    using Unit = typename Access<T, n()>::Bits;
    launch("unpermute_bwd", stream, blocks_of_warps(maps.choices + maps.row_groups()), block_threads,
           unpermute_bwd_kernel<T, n()>, dout.ptr<Unit>(), dprobs ? y->ptr<Unit>() : nullptr, maps,
           probs ? probs->ptr<float>() : nullptr, dy.ptr<Unit>(), dprobs ? dprobs->ptr<float>() : nullptr,
           dout.shape[1] / n(), stream.fault);
  });
}

}  // namespace xt::cuda
