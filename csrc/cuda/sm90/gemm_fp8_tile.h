// One stage of a float8 tile in shared memory, its scales, and its product. A stage is one block of 128 k: lines of 128
// bytes along k, one per m or n, so that its bytes are laid out as those of a bfloat16 stage of 64 k.
#pragma once
#include "cuda/gemm_fp8.h"
#include "cuda/sm90/gemm_tile.h"
#include "cuda/sm90/tensor_map.h"

namespace xt::cuda::sm90 {

constexpr int part_n = 128;               // columns that one product computes
constexpr int part_blocks = part_n / 8;
constexpr int idle_threads = warpgroup - warp_size;  // of the loading warpgroup, of which one thread loads

// Shared memory from its first byte on: the stages' operands, then their scales, then the ring's barriers. Scales are
// those of the tile's rows and, where each column has its own, of its columns.
template <int block_n, bool column_scales>
struct Fp8Stages {
  using S = Stage<block_n>;
  static constexpr int count = S::count;
  static constexpr int a_scale_bytes = block_m * 4;
  static constexpr int scale_bytes = a_scale_bytes + (column_scales ? block_n * 4 : 0);
  static constexpr int bytes = S::bytes + scale_bytes;  // that arrive for a stage
  static constexpr int all_bytes = count * bytes + Ring<count>::barrier_bytes + shared_slack;
  static_assert(all_bytes <= 227 * 1024);

  uint32_t shared;

  __device__ uint32_t a(int stage) const { return shared + static_cast<uint32_t>(stage * S::bytes); }
  __device__ uint32_t b(int stage) const { return a(stage) + S::a_bytes; }
  __device__ uint32_t a_scales(int stage) const {
    return shared + static_cast<uint32_t>(count * S::bytes + stage * scale_bytes);
  }
  __device__ uint32_t b_scales(int stage) const { return a_scales(stage) + a_scale_bytes; }
  __device__ Ring<count> ring() const { return {shared + static_cast<uint32_t>(count * bytes)}; }
};

// of_block = a's 64 rows of this warpgroup times 128 columns of b, over one stage. Waits for the result: while this
// warpgroup adds it up, the other's product runs.
template <class A, class B>
__device__ __forceinline__ void multiply_block(uint32_t a, uint32_t b, int math_group,
                                               float (&of_block)[part_blocks][4]) {
  const uint32_t rows = a + static_cast<uint32_t>(math_group * chunk_bytes);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < fp8_block; k += 32) {
    wgmma_fp8(A{}, B{}, of_block, operand(rows + static_cast<uint32_t>(k), 16, 8 * 128),
              operand(b + static_cast<uint32_t>(k), 16, 8 * 128), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  sums_ready(of_block);
}

// Without what these products never have, so that the compiler leaves it out, too.
__device__ inline Epilogue plain(Epilogue e) {
  e.bias = nullptr;
  e.act = nullptr;
  return e;
}

// The scales of the two rows that a lane has sums of.
struct RowScales {
  float low, high;  // rows g and g + 8 of the warp's 16

  __device__ static RowScales load(uint32_t scales, int first_row) {
    const uint32_t at = scales + static_cast<uint32_t>(4 * (first_row + lane() / 4));
    return {load_shared(at), load_shared(at + 4 * 8)};
  }
};

}  // namespace xt::cuda::sm90
