#include "cuda/cuda.h"
#include "cuda/exchange.h"
#include "cuda/row_math.h"

namespace xt::cuda {
namespace {

constexpr int per_lane = 2;

// As unpermute, of rows that lie where the ranks of their experts left them.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    sum_kernel(Dest dest, Peers peers, const float* __restrict__ probs, typename Access<T, N>::Bits* __restrict__ out,
               RowTiles<per_lane> tiles, uint64_t* fault) {
  using A = Access<T, N>;
  using Bits = typename A::Bits;
  __shared__ PeerRows table[max_peers];
  load_table(peers, 0, table);
  const int64_t bytes = tiles.units * static_cast<int64_t>(sizeof(Bits));
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const int64_t first = tile.row * dest.num_experts_per_tok, last = first + dest.num_experts_per_tok;
    const int left = tiles.left(tile);
    float sum[per_lane][N] = {};
    const auto row_of = [&](int64_t choice) {
      return reinterpret_cast<const Bits*>(dest.row(choice, table, peers.world, bytes, fault));
    };
    sum_choices<T, N, per_lane>(row_of, probs, first, last, tile.begin, left, sum);
    Bits* to = out + tile.row * tiles.units + tile.begin;
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size < left) to[j * warp_size] = A::narrow(sum[j]);
    }
  }
}

// A warp per choice reads its row of y where it is and writes its gradient there.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    gradient_kernel(const typename Access<T, N>::Bits* __restrict__ dout, Dest dest, Peers peers,
                    const float* __restrict__ probs, float* __restrict__ dprobs, int64_t units, uint64_t* fault) {
  using Bits = typename Access<T, N>::Bits;
  __shared__ PeerRows y[max_peers], dy[max_peers];
  load_table(peers, 0, y);
  load_table(peers, 1, dy);
  const int64_t bytes = units * static_cast<int64_t>(sizeof(Bits));
  for (int64_t i = grid_warp(); i < dest.choices; i += grid_warps()) {
    const auto* from = reinterpret_cast<const Bits*>(dest.row(i, y, peers.world, bytes, fault));
    auto* to = reinterpret_cast<Bits*>(dest.row(i, dy, peers.world, bytes, fault));
    const int64_t token = static_cast<uint32_t>(i) / dest.num_experts_per_tok;
    float dot = 0;
    if (from && to) dot = warp_sum(scale_and_dot<T, N>(dout + token * units, from, to, units, __ldg(probs + i)));
    if (lane() == 0) dprobs[i] = dot;
  }
}

}  // namespace

void ep_combine(const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor* probs, const Tensor& out,
                Stream stream) {
  const char* op = "ep_combine";
  const OnDevice guard(op, y);
  exchange(op, EpOp::combine, peers, Shown(peers, y), Shown(), stream);
  with_access(y.dtype, y.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    using Bits = typename Access<T, n()>::Bits;
    const RowTiles<per_lane> tiles(out.shape[0], out.shape[1] / n());
    launch(op, stream, few_blocks(tiles.count() * warp_size), block_threads, sum_kernel<T, n()>, Dest(route.dest), peers,
           probs ? probs->ptr<float>() : nullptr, out.ptr<Bits>(), tiles, stream.fault);
  });
}

void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& route, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, Stream stream) {
  const char* op = "ep_combine_bwd";
  const OnDevice guard(op, dout);
  exchange(op, EpOp::combine_bwd, peers, Shown(peers, y), Shown(peers, dy), stream);
  const Dest dest(route.dest);
  with_access(y.dtype, y.shape[1], [&](auto element, auto n) {
    using T = decltype(element);
    launch(op, stream, few_blocks(dest.choices * warp_size), block_threads, gradient_kernel<T, n()>,
           dout.ptr<typename Access<T, n()>::Bits>(), dest, peers, probs.ptr<float>(), dprobs.ptr<float>(),
           y.shape[1] / n(), stream.fault);
  });
  zero_unused_rows(op, dy, route.counts, peers, stream);
  exchange(op, EpOp::combine_bwd, peers, stream);
}

}  // namespace xt::cuda
