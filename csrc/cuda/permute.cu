#include "cuda/cuda.h"
#include "cuda/maps.h"

namespace xt::cuda {
namespace {

constexpr int per_lane = 4;

// A warp reads its part of a token once, keeps it in registers and writes it to the rows of all K choices: x is read
// once, where gathering row by row would read it K times. The warps after those of the tokens zero unowned rows.
template <class Unit>
__global__ void __launch_bounds__(block_threads, 4)  // 64 registers: 4 blocks have 64 KiB of loads in flight
    permute_kernel(const Unit* __restrict__ x, Maps maps, Unit* __restrict__ out, RowTiles<per_lane> tiles,
                   uint64_t* fault) {
  for (int64_t i = grid_warp(); i < tiles.count() + maps.row_groups(); i += grid_warps()) {
    if (i >= tiles.count()) {
      zero_unowned(maps, i - tiles.count(), out, tiles.units, fault, Fault::permute_maps);
      continue;
    }
    const auto tile = tiles.at(i);
    const int left = tiles.left(tile);
    const Unit* in = x + tile.row * tiles.units + tile.begin;
    Unit unit[per_lane] = {};
#pragma unroll
    for (int j = 0; j < per_lane; ++j) {
      if (j * warp_size < left) unit[j] = __ldg(in + j * warp_size);
    }
    const int64_t first = tile.row * maps.num_experts_per_tok, last = first + maps.num_experts_per_tok;
    for (int64_t choice = first; choice < last; ++choice) {
      const int32_t row = maps.row(choice, fault, Fault::permute_maps);
      if (row < 0) continue;
      Unit* to = out + row * tiles.units + tile.begin;
#pragma unroll
      for (int j = 0; j < per_lane; ++j) {
        if (j * warp_size < left) to[j * warp_size] = unit[j];
      }
    }
  }
}

}  // namespace

void permute(const Tensor& x, const Tensor& row_of, const Tensor& src, const Tensor& out, Stream stream) {
  const OnDevice guard("permute", x);
  const Maps maps(row_of, &src, src.shape[0]);
  with_access(x.dtype, x.shape[1], [&](auto element, auto n) {
    using Unit = typename Access<decltype(element), n()>::Bits;
    const RowTiles<per_lane> tiles(x.shape[0], x.shape[1] / n());
    launch("permute", stream, blocks_of_warps(tiles.count() + maps.row_groups()), block_threads, permute_kernel<Unit>,
           x.ptr<Unit>(), maps, out.ptr<Unit>(), tiles, stream.fault);
  });
}

}  // namespace xt::cuda
