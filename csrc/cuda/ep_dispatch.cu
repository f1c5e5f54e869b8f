#include "cuda/cuda.h"
#include "cuda/exchange.h"

namespace xt::cuda {
namespace {

constexpr const char* op = "ep_dispatch";
constexpr int per_lane = 4;

// A warp reads its part of a token once, keeps it in registers and writes it to the rows of all its choices.
template <class Unit>
__global__ void __launch_bounds__(block_threads)
    send_kernel(const Unit* __restrict__ x, Dest dest, Peers peers, RowTiles<per_lane> tiles, uint64_t* fault) {
  __shared__ PeerRows table[max_peers];
  load_table(peers, 0, table);
  const int64_t bytes = tiles.units * static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = grid_warp(); i < tiles.count(); i += grid_warps()) {
    const auto tile = tiles.at(i);
    const int left = tiles.left(tile);
    const Unit* in = x + tile.row * tiles.units + tile.begin;
    Unit unit[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size < left) unit[j] = __ldg(in + j * warp_size);
    }
    const int64_t first = tile.row * dest.num_experts_per_tok, last = first + dest.num_experts_per_tok;
    for (int64_t choice = first; choice < last; ++choice) {
      char* row = dest.row(choice, table, peers.world, bytes, fault);
      if (!row) continue;
      Unit* to = reinterpret_cast<Unit*>(row) + tile.begin;
#pragma unroll
      for (int j = 0; j < per_lane; ++j) {
        if (j * warp_size < left) to[j * warp_size] = unit[j];
      }
    }
  }
}

// The scales of quantized rows: a column for each token, and for each row. Neighbouring threads take neighbouring choices.
__global__ void __launch_bounds__(block_threads)
    send_scales_kernel(const float* __restrict__ scales, int64_t count, int64_t ld, Dest dest, Peers peers) {
  __shared__ PeerRows table[max_peers];
  load_table(peers, 1, table);
  const int64_t stride = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < dest.choices * count; i += stride) {
    const int64_t s = i / dest.choices, choice = i % dest.choices;
    const int32_t p = __ldg(dest.pairs + 2 * choice), row = __ldg(dest.pairs + 2 * choice + 1);
    if (p < 0 || p >= peers.world) continue;  // noted where the row is sent
    const PeerRows& out = table[p];
    if (row < 0 || row >= out.row_bytes / 4 || s >= out.rows) continue;
    reinterpret_cast<float*>(out.data + s * out.row_bytes)[row] = __ldg(scales + s * ld + choice / dest.num_experts_per_tok);
  }
}

__global__ void __launch_bounds__(block_threads)
    zero_columns_kernel(float* __restrict__ scales, int64_t count, int64_t ld, RowsHere rows_here) {
  const int64_t used = rows_here.get();
  for (int64_t s = grid_warp(); s < count; s += grid_warps()) {
    for (int64_t c = used + lane(); c < ld; c += warp_size) scales[s * ld + c] = 0.0f;
  }
}

}  // namespace

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& route, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, Stream stream) {
  const OnDevice guard(op, x);
  exchange(op, EpOp::dispatch, peers, Shown(peers, out), out_scales ? Shown(peers, *out_scales) : Shown(), stream);
  const Dest dest(route.dest);
  with_units(row_bytes(x), [&](auto unit) {
    using Unit = decltype(unit);
    const RowTiles<per_lane> tiles(x.shape[0], row_bytes(x) / static_cast<int64_t>(sizeof(Unit)));
    launch(op, stream, few_blocks(tiles.count() * warp_size), block_threads, send_kernel<Unit>, x.ptr<Unit>(), dest,
           peers, tiles, stream.fault);
  });
  zero_unused_rows(op, out, route.counts, peers, stream);
  if (scales) {
    const int64_t count = scales->shape[0];
    launch(op, stream, few_blocks(dest.choices * count), block_threads, send_scales_kernel, scales->ptr<float>(), count,
           scales->shape[1], dest, peers);
    launch(op, stream, few_blocks(count * warp_size), block_threads, zero_columns_kernel, out_scales->ptr<float>(), count,
           out_scales->shape[1], RowsHere(route.counts, peers, out.shape[0]));
  }
  exchange(op, EpOp::dispatch, peers, stream);
}

}  // namespace xt::cuda
