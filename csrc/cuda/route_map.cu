// A stable counting sort in three kernels. The choices (flat t*K + k) are cut into blocks; `count` counts each block's
// experts, `scan` turns these counts into each block's first rank within each expert, and the experts' sizes into
// offsets; `write` ranks each block's choices in order and writes both maps.
#include "cuda/cuda.h"
#include "cuda/launch.h"

namespace xt::cuda {
namespace {

constexpr int warps = block_threads / warp_size;
constexpr int steps = 4;                              // choices that a lane holds at a time
constexpr int warp_choices = steps * warp_size;       // neighbouring choices of one warp
constexpr int block_choices = warps * warp_choices;   // that a block takes at a time
constexpr int max_blocks = 512;
constexpr int expert_tile = 1024;                     // experts counted in shared memory at a time
constexpr int scan_threads = 1024;

struct Cut {
  int64_t choices, per_block, blocks;

  explicit Cut(int64_t choices) : choices(choices) {
    const int64_t rounds = (choices + block_choices - 1) / block_choices;
    const int64_t rounds_per_block = std::max<int64_t>(1, (rounds + max_blocks - 1) / max_blocks);
    per_block = rounds_per_block * block_choices;
    blocks = (choices + per_block - 1) / per_block;
  }
};

// The expert of choice i; -1 where it is dropped, out of range or there is no such choice.
template <class Index>
__device__ int expert_of(const Index* topk_idx, int64_t i, int64_t choices, int num_experts, uint64_t* fault) {
  if (i >= choices) return -1;
  const Index e = topk_idx[i];
  if (e >= -1 && e < num_experts) return static_cast<int>(e);
  note(fault, Fault::route_map_index, i);
  return -1;
}

// block_counts[e, b]: choices of block b with expert e.
template <class Index>
__global__ void __launch_bounds__(block_threads)
    count_kernel(const Index* __restrict__ topk_idx, Cut cut, int num_experts, int32_t* __restrict__ block_counts,
                 uint64_t* fault) {
  __shared__ int32_t count[expert_tile];
  const int64_t begin = blockIdx.x * cut.per_block, end = begin + cut.per_block;
  int first = 0;
  do {  // once even without experts: every index but -1 is a fault then
    const int experts = min(expert_tile, num_experts - first);
    for (int e = threadIdx.x; e < experts; e += block_threads) count[e] = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += block_threads) {
      const int e = expert_of(topk_idx, i, cut.choices, num_experts, fault) - first;
      if (e >= 0 && e < experts) atomicAdd(&count[e], 1);
    }
    __syncthreads();
    // Each thread writes out the counts that it will set to zero for the next tile: no barrier between the two.
    for (int e = threadIdx.x; e < experts; e += block_threads) {
      block_counts[static_cast<int64_t>(first + e) * cut.blocks + blockIdx.x] = count[e];
    }
    first += expert_tile;
  } while (first < num_experts);
}

// In place, block_counts[e, b] becomes the rank within expert e of block b's first choice. One block does it all, a
// warp per expert: the array is small, and a second kernel would cost more than it saves.
__global__ void __launch_bounds__(scan_threads)
    scan_kernel(int32_t* __restrict__ block_counts, int64_t num_blocks, int64_t num_experts, int64_t align,
                int64_t capacity, int32_t* __restrict__ counts, int64_t* __restrict__ offsets, uint64_t* fault) {
  __shared__ int64_t rows[scan_threads / warp_size];
  const int warp = threadIdx.x / warp_size;
  int64_t first_row = 0;  // of the experts of this round; only warp 0 keeps it
  for (int64_t first = 0; first < num_experts; first += scan_threads / warp_size) {
    const int64_t e = first + warp;
    int32_t total = 0;
    for (int64_t b = lane(); e < num_experts && b - lane() < num_blocks; b += warp_size) {
      const int32_t here = b < num_blocks ? block_counts[e * num_blocks + b] : 0;
      const int32_t up_to = inclusive_sum(here);
      if (b < num_blocks) block_counts[e * num_blocks + b] = total + up_to - here;
      total += __shfl_sync(all_lanes, up_to, warp_size - 1);
    }
    if (lane() == 0) {
      rows[warp] = (total + align - 1) / align * align;
      if (e < num_experts) counts[e] = total;
    }
    __syncthreads();
    if (warp == 0) {
      const int64_t here = rows[lane()], up_to = inclusive_sum(here);
      if (first + lane() < num_experts) offsets[first + lane()] = min(first_row + up_to - here, capacity);
      first_row += __shfl_sync(all_lanes, up_to, warp_size - 1);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (first_row > capacity) note(fault, Fault::route_map_capacity, first_row);
    offsets[num_experts] = min(first_row, capacity);
  }
}

// src = -1 on pad rows and on rows past the last expert.
__device__ void clear_unused(const int32_t* counts, const int64_t* offsets, int num_experts, int64_t capacity,
                             int32_t* src) {
  for (int64_t e = grid_warp(); e < num_experts; e += grid_warps()) {
    for (int64_t row = offsets[e] + counts[e] + lane(); row < offsets[e + 1]; row += warp_size) src[row] = -1;
  }
  const int64_t stride = grid_warps() * warp_size;
  const int64_t used = offsets[num_experts];
  for (int64_t row = used + grid_warp() * warp_size + lane(); row < capacity; row += stride) src[row] = -1;
}

// Each warp counts the experts of its `warp_choices` choices, a scan over the warps turns that into the ranks of each
// warp's first choices, and each warp then walks its choices in order.
template <class Index>
__global__ void __launch_bounds__(block_threads)
    write_kernel(const Index* __restrict__ topk_idx, Cut cut, int num_experts, int64_t capacity,
                 const int32_t* __restrict__ block_ranks, const int32_t* __restrict__ counts,
                 const int64_t* __restrict__ offsets, int32_t* __restrict__ row_of, int32_t* __restrict__ src) {
  __shared__ int32_t next[expert_tile];              // rank of the block's next choice
  __shared__ int32_t warp_next[warps][expert_tile];  // rank of each warp's next choice
  const int warp = threadIdx.x / warp_size;
  const unsigned lanes_before = (1u << lane()) - 1;
  clear_unused(counts, offsets, num_experts, capacity, src);
  if (blockIdx.x >= cut.blocks) return;  // the whole block: it came for clear_unused

  const int64_t block_begin = blockIdx.x * cut.per_block, block_end = min(cut.choices, block_begin + cut.per_block);
  int first = 0;
  do {  // once even without experts: dropped choices are written
    const int experts = min(expert_tile, num_experts - first);
    // next[e] belongs to one thread from here to the end of the tile.
    for (int e = threadIdx.x; e < experts; e += block_threads) {
      next[e] = block_ranks[static_cast<int64_t>(first + e) * cut.blocks + blockIdx.x];
    }
    for (int64_t begin = block_begin; begin < block_end; begin += block_choices) {
      const int64_t mine = begin + warp * warp_choices + lane();
      int expert[steps];
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        expert[s] = expert_of(topk_idx, mine + s * warp_size, block_end, num_experts, nullptr) - first;
      }
      for (int e = lane(); e < experts; e += warp_size) warp_next[warp][e] = 0;
      __syncwarp();
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        if (expert[s] >= 0 && expert[s] < experts) atomicAdd(&warp_next[warp][expert[s]], 1);
      }
      __syncthreads();
      for (int e = threadIdx.x; e < experts; e += block_threads) {
        int32_t rank = next[e];
        for (int w = 0; w < warps; ++w) {
          const int32_t here = warp_next[w][e];
          warp_next[w][e] = rank;
          rank += here;
        }
        next[e] = rank;
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        const int64_t i = mine + s * warp_size;
        const bool here = expert[s] >= 0 && expert[s] < experts;
        const int key = here ? expert[s] : -1;
        const unsigned peers = __match_any_sync(all_lanes, key);  // lanes with the same expert
        const int leader = __ffs(peers) - 1;
        int32_t rank = 0;
        if (here && lane() == leader) {
          rank = warp_next[warp][key];
          warp_next[warp][key] = rank + __popc(peers);
        }
        rank = __shfl_sync(all_lanes, rank, leader) + __popc(peers & lanes_before);
        __syncwarp();  // the next step's leader, or the next round, uses warp_next
        if (here) {
          const int64_t row = offsets[first + key] + rank;
          row_of[i] = row < capacity ? static_cast<int32_t>(row) : -1;
          if (row < capacity) src[row] = static_cast<int32_t>(i);
        } else if (first == 0 && expert[s] < 0 && i < block_end) {
          row_of[i] = -1;
        }
      }
    }
    first += expert_tile;
  } while (first < num_experts);
}

template <class Index>
void run(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets, const Tensor& row_of,
         const Tensor& src, const Tensor* workspace, Stream stream) {
  const char* op = "route_map";
  const Cut cut(topk_idx.numel());
  const int num_experts = static_cast<int>(counts.shape[0]);
  const int64_t capacity = src.shape[0];
  int32_t* block_counts = workspace ? workspace->ptr<int32_t>() : nullptr;
  launch(op, stream, cut.blocks, block_threads, count_kernel<Index>, topk_idx.ptr<Index>(), cut, num_experts,
         block_counts, stream.fault);
  launch(op, stream, 1, scan_threads, scan_kernel, block_counts, cut.blocks, num_experts, align, capacity,
         counts.ptr<int32_t>(), offsets.ptr<int64_t>(), stream.fault);
  const int64_t clearing = std::min<int64_t>(max_blocks, (capacity + block_choices - 1) / block_choices);
  launch(op, stream, std::max(cut.blocks, clearing), block_threads, write_kernel<Index>, topk_idx.ptr<Index>(), cut,
         num_experts, capacity, block_counts, counts.ptr<int32_t>(), offsets.ptr<int64_t>(), row_of.ptr<int32_t>(),
         src.ptr<int32_t>());
}

}  // namespace

int64_t route_map_workspace_size(int64_t num_choices, int64_t num_experts) {
  return Cut(num_choices).blocks * num_experts;
}

void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, const Tensor* workspace, Stream stream) {
  const OnDevice guard("route_map", topk_idx);
  (topk_idx.dtype == DType::i32 ? run<int32_t> : run<int64_t>)(topk_idx, align, counts, offsets, row_of, src, workspace,
                                                                stream);
}

}  // namespace xt::cuda
