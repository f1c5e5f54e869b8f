// One stage of a bfloat16 tile in shared memory and its product, for any orientation of the operands.
#pragma once
#include "cuda/sm90/pipeline.h"

namespace xt::cuda::sm90 {

constexpr int block_m = 128;        // rows of a tile: 64 per warpgroup that multiplies
constexpr int block_k = 64;         // of k per stage: lines along k are 128 bytes
constexpr int run = 64;             // elements of m or n in a line of 128 bytes
constexpr int chunk_bytes = 8192;   // 64 lines of 128 bytes

// A tile of 64 values of k is lines of 128 bytes, one per m or n with 64 k each; or, where the operand lies along m or
// n in memory, chunks of 64 lines, one per k with 64 m or n each. Either way 64 m or n take 8192 bytes.
template <int block_n>
struct Stage {
  static constexpr int a_bytes = block_m / run * chunk_bytes;
  static constexpr int b_bytes = block_n / run * chunk_bytes;
  static constexpr int bytes = a_bytes + b_bytes;
  static constexpr int count = 192 * 1024 / bytes;  // in the ring: 4 of 48 KiB, 6 of 32
};

template <int block_n>
constexpr int shared_bytes = Stage<block_n>::count * Stage<block_n>::bytes +
                             Ring<Stage<block_n>::count>::barrier_bytes + shared_slack;
static_assert(shared_bytes<128> <= 227 * 1024 && shared_bytes<256> <= 227 * 1024);

// The operand from k on, for one product of 16 k.
template <bool along_k>
__device__ __forceinline__ uint64_t operand_at(uint32_t address, int k) {
  if constexpr (along_k) return operand(address + static_cast<uint32_t>(2 * k), 16, 8 * 128);
  return operand(address + static_cast<uint32_t>(k * 128), chunk_bytes, 8 * 128);
}

// sums (+)= a's 64 rows of this warpgroup times b, over one stage; started, not waited for.
template <bool a_along_k, bool b_along_k, int blocks>
__device__ __forceinline__ void start_product(uint32_t a, uint32_t b, int math_group, bool add,
                                              float (&sums)[blocks][4]) {
  const uint32_t rows = a + static_cast<uint32_t>(math_group * chunk_bytes);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < block_k; k += 16) {
    wgmma_bf16<!a_along_k, !b_along_k>(sums, operand_at<a_along_k>(rows, k), operand_at<b_along_k>(b, k), add || k > 0);
  }
  wgmma_commit();
}

// 16-byte unit `unit` of line `line`, as the copy engine would have swizzled it.
__device__ __forceinline__ uint32_t swizzled(uint32_t base, int line, int unit) {
  return base + static_cast<uint32_t>(line * 128 + (unit ^ (line & 7)) * 16);
}

// ---- where the loading warpgroup gathers rows itself: cp.async, as the copy engine knows no map ----

constexpr int gather_delay = 2;  // stages that are on their way before the first is waited for

// Tells the readers that the copies of all but the last `pending` stages are there, for stage `stage`.
template <int pending, int stages>
__device__ __forceinline__ void gathered(const Ring<stages>& ring, int stage) {
  copy_async_wait<pending>();
  fence_proxy_async();
  barrier_arrive(ring.full(stage));
}

// The same for the stages that are left at the end, from `next` on, of all that this thread started.
template <int stages>
__device__ __forceinline__ void last_gathered(const Ring<stages>& ring, Place<stages> next, int64_t started) {
  copy_async_wait<0>();
  fence_proxy_async();
  for (int64_t i = min(started, int64_t{gather_delay}); i > 0; --i, next.advance()) {
    barrier_arrive(ring.full(next.stage));
  }
}

}  // namespace xt::cuda::sm90
