#include "cuda/activation.h"
#include "cuda/cuda.h"
#include "cuda/rows.h"

namespace xt::cuda {
namespace {

constexpr int per_lane = 2;

// Tiles are tiles of the output's rows; a row of x is two of them, gate and up.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    swiglu_kernel(const typename Access<T, N>::Bits* __restrict__ x, UsedRows used_rows, Swiglu f,
                  typename Access<T, N>::Bits* __restrict__ out, RowTiles<per_lane> tiles, uint64_t* fault) {
  using A = Access<T, N>;
  const int64_t used = used_rows.get(fault);
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const bool live = tile.row < used;
    const int left = tiles.left(tile);
    const auto* gates = x + tile.row * 2 * tiles.units + tile.begin;
    typename A::Bits gate[per_lane] = {}, up[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (!live || j * warp_size >= left) continue;
      gate[j] = __ldg(gates + j * warp_size);
      up[j] = __ldg(gates + tiles.units + j * warp_size);
    }
    auto* to = out + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      float g[N], v[N];
      A::widen(gate[j], g);
      A::widen(up[j], v);
#pragma unroll
      for (int n = 0; n < N; ++n) g[n] = live ? f.forward(g[n], v[n]) : 0.0f;
      if (j * warp_size < left) to[j * warp_size] = A::narrow(g);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    swiglu_bwd_kernel(const typename Access<T, N>::Bits* __restrict__ dout,
                      const typename Access<T, N>::Bits* __restrict__ x, UsedRows used_rows, Swiglu f,
                      typename Access<T, N>::Bits* __restrict__ dx, RowTiles<per_lane> tiles, uint64_t* fault) {
  using A = Access<T, N>;
  const int64_t used = used_rows.get(fault);
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const bool live = tile.row < used;
    const int left = tiles.left(tile);
    const auto* grads = dout + tile.row * tiles.units + tile.begin;
    const auto* gates = x + tile.row * 2 * tiles.units + tile.begin;
    typename A::Bits grad[per_lane] = {}, gate[per_lane] = {}, up[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (!live || j * warp_size >= left) continue;
      grad[j] = __ldg(grads + j * warp_size);
      gate[j] = __ldg(gates + j * warp_size);
      up[j] = __ldg(gates + tiles.units + j * warp_size);
    }
    auto* to = dx + tile.row * 2 * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      float d[N], g[N], v[N];
      A::widen(grad[j], d);
      A::widen(gate[j], g);
      A::widen(up[j], v);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float dg = 0.0f, du = 0.0f;
        if (live) f.backward(d[n], g[n], v[n], dg, du);
        g[n] = dg;
        v[n] = du;
      }
      if (j * warp_size >= left) continue;
      to[j * warp_size] = A::narrow(g);
      to[tiles.units + j * warp_size] = A::narrow(v);
    }
  }
}

}  // namespace

void swiglu(const Tensor& x, const Tensor* offsets, const SwigluParams& params, const Tensor& out, Stream stream) {
  const OnDevice guard("swiglu", x);
  with_access(x.dtype, out.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    using Unit = typename Access<T, n()>::Bits;
    const RowTiles<per_lane> tiles(out.shape[0], out.shape[1] / n());
    launch("swiglu", stream, blocks_of_warps(tiles.count()), block_threads, swiglu_kernel<T, n()>, x.ptr<Unit>(),
           UsedRows(offsets, x.shape[0]), Swiglu(params), out.ptr<Unit>(), tiles, stream.fault);
  });
}

void swiglu_bwd(const Tensor& dout, const Tensor& x, const Tensor* offsets, const SwigluParams& params,
                const Tensor& dx, Stream stream) {
  const OnDevice guard("swiglu_bwd", dout);
  with_access(dout.dtype, dout.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    using Unit = typename Access<T, n()>::Bits;
    const RowTiles<per_lane> tiles(dout.shape[0], dout.shape[1] / n());
    launch("swiglu_bwd", stream, blocks_of_warps(tiles.count()), block_threads, swiglu_bwd_kernel<T, n()>,
           dout.ptr<Unit>(), x.ptr<Unit>(), UsedRows(offsets, x.shape[0]), Swiglu(params), dx.ptr<Unit>(), tiles, stream.fault);
  });
}

}  // namespace xt::cuda
