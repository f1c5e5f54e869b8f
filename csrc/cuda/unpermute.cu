#include "cuda/cuda.h"
#include "cuda/maps.h"
#include "cuda/row_math.h"

namespace xt::cuda {
namespace {

// Each warp sums some columns of one token in registers.
constexpr int per_lane = 2;

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
    const auto row_of = [&](int64_t choice) -> const typename A::Bits* {
      const int32_t row = maps.row(choice, fault, Fault::unpermute_row_of);
      return row < 0 ? nullptr : y + row * tiles.units;
    };
    sum_choices<T, N, per_lane>(row_of, probs, first, last, tile.begin, left, sum);
    auto* to = out + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size < left) to[j * warp_size] = A::narrow(sum[j]);
    }
  }
}

// The K choices of a token lie in one block or two, so that dout comes from the first-level cache all but once.
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
