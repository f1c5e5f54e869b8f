#include "cuda/cuda.h"
#include "cuda/exchange.h"

namespace xt::cuda {
namespace {

constexpr const char* op = "ep_prepare";

// What a rank shows the others in its index area: choices per expert [E].
__device__ int32_t* shown_counts(const Peers& peers, int rank, uint32_t epoch) {
  return reinterpret_cast<int32_t*>(index_area(peers, rank, epoch));
}

__global__ void __launch_bounds__(block_threads) show_kernel(const int32_t* __restrict__ counts, int experts, Peers peers) {
  int32_t* area = shown_counts(peers, peers.rank, coming_exchange(peers));
  for (int e = threadIdx.x; e < experts; e += block_threads) area[e] = __ldg(counts + e);
}

// Collects the counts of all ranks, and from them first_row[e]: the first row, on its owner, that this rank sends to
// expert e; and the experts of this rank.
__global__ void __launch_bounds__(1024)
    collect_kernel(int experts, int64_t bound, Peers peers, int32_t* counts, int64_t* __restrict__ first_row,
                   int64_t* __restrict__ offsets, uint64_t* fault) {
  const uint32_t epoch = current_exchange(peers);
  const int world = peers.world, here = experts / world;
  for (int s = 0; s < world; ++s) {
    const int32_t* theirs = shown_counts(peers, s, epoch);
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[s * experts + e] = theirs[e];
  }
  __syncthreads();
  const int p = static_cast<int>(threadIdx.x);
  if (p >= world) return;
  int64_t next = 0;
  for (int e = p * here; e < (p + 1) * here; ++e) {
    if (p == peers.rank) offsets[e - p * here] = min(next, bound);
    for (int s = 0; s < world; ++s) {
      if (s == peers.rank) first_row[e] = next;
      next += counts[s * experts + e];
    }
  }
  if (p == peers.rank) offsets[here] = min(next, bound);
  if (next > INT32_MAX) note(fault, Fault::ep_rows, next);
}

// Choices out of range, which route_map has noted, are dropped.
template <class Index>
__global__ void __launch_bounds__(block_threads)
    dest_kernel(const Index* __restrict__ topk_idx, int64_t choices, int experts, int here, int64_t bound,
                const int32_t* __restrict__ row_of, const int64_t* __restrict__ first_of,
                const int64_t* __restrict__ first_row, int32_t* __restrict__ dest) {
  const int64_t stride = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < choices; i += stride) {
    const Index e = __ldg(topk_idx + i);
    int32_t rank = -1, row = -1;
    if (e >= 0 && e < experts) {
      // row_of - first_of: earlier choices of the same expert on this rank.
      const int64_t to = __ldg(first_row + e) + __ldg(row_of + i) - __ldg(first_of + e);
      if (to >= 0 && to < bound) {
        rank = static_cast<int32_t>(static_cast<uint32_t>(e) / static_cast<uint32_t>(here));
        row = static_cast<int32_t>(to);
      }
    }
    dest[2 * i] = rank;
    dest[2 * i + 1] = row;
  }
}

// The workspace, in int32: first the parts that hold int64.
struct Workspace {
  int64_t first_of, first_row, row_of, src, sort, size;

  Workspace(int64_t choices, int64_t experts)
      : first_of(0),
        first_row(2 * (experts + 1)),
        row_of(first_row + 2 * experts),
        src(row_of + choices),
        sort(src + choices),
        size(sort + route_map_workspace_size(choices, experts)) {}
};

template <class Index>
void run(const Tensor& topk_idx, int64_t bound, const Peers& peers, const Tensor& counts, const Tensor& dest,
         const Tensor& offsets, const Tensor& workspace, Stream stream) {
  const int64_t experts = counts.shape[1], choices = topk_idx.numel();
  const Workspace at(choices, experts);
  const auto view = [&](void* data, DType dtype, std::initializer_list<int64_t> shape) {
    Tensor t(data, dtype, shape);
    t.device = topk_idx.device;
    return t;
  };
  int32_t* work = workspace.ptr<int32_t>();
  auto *first_of = reinterpret_cast<int64_t*>(work + at.first_of), *first_row = reinterpret_cast<int64_t*>(work + at.first_row);
  int32_t* row_of = work + at.row_of;
  // This rank's counts stand where they will stand among everybody's.
  int32_t* own_counts = counts.ptr<int32_t>() + peers.rank * experts;
  const Tensor sort = view(work + at.sort, DType::i32, {at.size - at.sort});
  route_map(topk_idx, 1, view(own_counts, DType::i32, {experts}), view(first_of, DType::i64, {experts + 1}),
            view(row_of, DType::i32, {topk_idx.shape[0], topk_idx.shape[1]}), view(work + at.src, DType::i32, {choices}),
            &sort, stream);
  launch(op, stream, 1, block_threads, show_kernel, own_counts, experts, peers);
  exchange(op, EpOp::prepare, peers, stream);
  launch(op, stream, 1, 1024, collect_kernel, experts, bound, peers, counts.ptr<int32_t>(), first_row,
         offsets.ptr<int64_t>(), stream.fault);
  launch(op, stream, few_blocks(choices), block_threads, dest_kernel<Index>, topk_idx.ptr<Index>(), choices, experts,
         experts / peers.world, bound, row_of, first_of, first_row, dest.ptr<int32_t>());
}

}  // namespace

int64_t ep_prepare_workspace_size(int64_t num_choices, int64_t num_experts) {
  return Workspace(num_choices, num_experts).size;
}

void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, const Tensor& workspace, Stream stream) {
  const OnDevice guard(op, topk_idx);
  const int64_t bound = capacity < 0 || capacity > INT32_MAX ? INT32_MAX : capacity;
  (topk_idx.dtype == DType::i32 ? run<int32_t> : run<int64_t>)(topk_idx, bound, peers, counts, dest, offsets, workspace,
                                                                stream);
}

}  // namespace xt::cuda
