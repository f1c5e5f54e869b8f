#include "cuda/exchange.h"

#include <chrono>

namespace xt::cuda {
namespace {

// Visible to, and of, all GPUs and the host. The tests' host has the same operations by other names.
__device__ uint32_t load_acquire(const uint32_t* p) {
#ifdef __CUDA_ARCH__
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#else
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

__device__ void store_release(uint32_t* p, uint32_t v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
#endif
}

__device__ uint64_t nanoseconds() {
#ifdef __CUDA_ARCH__
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

__device__ bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

// Returns no_fault once `other` has published, or what went wrong.
__device__ uint64_t wait_for(const Peers& peers, int other, uint32_t op, uint32_t epoch, uint64_t timeout_ns) {
  const Signals::Flag& flag = signals(peers, peers.rank).from[other];
  const int64_t where = ep_fault_index(op, other, epoch);
  const uint64_t start = nanoseconds();
  for (uint32_t polls = 1; !reached(load_acquire(&flag.epoch), epoch); ++polls) {
    if (polls % 64 == 0) {  // now and then: reading another rank's page is slow
      const bool gave_up = load_acquire(&signals(peers, other).failed) != 0;
      if (gave_up && !reached(load_acquire(&flag.epoch), epoch)) return fault_word(Fault::ep_gave_up, where);
      if (nanoseconds() - start > timeout_ns) return fault_word(Fault::ep_timeout, where);
    }
    __nanosleep(64);
  }
  return flag.op[epoch & 1] == op ? no_fault : fault_word(Fault::ep_order, where);
}

struct Tensors {
  Shown shown[2];
  int count;
};

// One block; thread p deals with rank p.
__global__ void __launch_bounds__(max_peers)
    exchange_kernel(Peers peers, uint32_t op, Tensors tensors, uint64_t timeout_ns, uint64_t* fault) {
  const int other = static_cast<int>(threadIdx.x);
  Signals& own = signals(peers, peers.rank);
  const uint32_t epoch = coming_exchange(peers);
  const bool failed = load_acquire(&own.failed) != 0;
  Shown* shown = reinterpret_cast<Shown*>(index_area(peers, peers.rank, epoch));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (other != 0 || i >= tensors.count) continue;
    shown[i].begin = tensors.shown[i].begin;
    shown[i].rows = tensors.shown[i].rows;
    shown[i].row_bytes = tensors.shown[i].row_bytes;
  }
  __syncthreads();  // all have read the epoch, and shown their tensors
  if (other == peers.rank) own.epoch = epoch;
  if (failed || other >= peers.world || other == peers.rank) return;
  Signals::Flag& theirs = signals(peers, other).from[peers.rank];
  theirs.op[epoch & 1] = op;
  __threadfence_system();  // what earlier kernels and the other threads wrote comes first
  store_release(&theirs.epoch, epoch);
  const uint64_t word = wait_for(peers, other, op, epoch, timeout_ns);
  if (word == no_fault) return;
  store_release(&own.failed, epoch);
  note(fault, static_cast<Fault>(word >> 56), static_cast<int64_t>(word));
}

template <class Unit>
__global__ void __launch_bounds__(block_threads)
    zero_kernel(Unit* __restrict__ rows, int64_t units, RowsHere used) {
  const int64_t stride = int64_t{gridDim.x} * block_threads, end = used.capacity * units;
  int64_t i = used.get() * units + int64_t{blockIdx.x} * block_threads + threadIdx.x;
  for (; i < end; i += stride) rows[i] = {};
}

void exchange(const char* name, EpOp op, const Peers& peers, const Tensors& tensors, Stream stream) {
  launch(name, stream, 1, max_peers, exchange_kernel, peers, static_cast<uint32_t>(op), tensors,
         static_cast<uint64_t>(peers.timeout_s * 1e9), stream.fault);
}

}  // namespace

void exchange(const char* name, EpOp op, const Peers& peers, Stream stream) {
  exchange(name, op, peers, Tensors{{}, 0}, stream);
}

void exchange(const char* name, EpOp op, const Peers& peers, const Shown& first, const Shown& second, Stream stream) {
  exchange(name, op, peers, Tensors{{first, second}, 2}, stream);
}

void zero_unused_rows(const char* name, const Tensor& rows, const Tensor& counts, const Peers& peers, Stream stream) {
  with_units(row_bytes(rows), [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t units = row_bytes(rows) / static_cast<int64_t>(sizeof(Unit));
    launch(name, stream, few_blocks(rows.shape[0] * units), block_threads, zero_kernel<Unit>, rows.ptr<Unit>(), units,
           RowsHere(counts, peers, rows.shape[0]));
  });
}

}  // namespace xt::cuda
