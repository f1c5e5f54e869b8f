// The ring of stages in shared memory between the warpgroup that loads tiles and those that multiply them. Each stage
// has two barriers: `full` ends a phase when its data is there, `empty` when nobody reads it any more.
#pragma once
#include "cuda/launch.h"
#include "cuda/sm90/ptx.h"

namespace xt::cuda {

// A place in the ring, and in which round it is used: its data arrives in the phase of that parity.
template <int stages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int stages>
struct Ring {
  static constexpr int barrier_bytes = 2 * 8 * stages;
  uint32_t barriers;  // in shared memory

  __device__ uint32_t full(int stage) const { return barriers + 8 * static_cast<uint32_t>(stage); }
  __device__ uint32_t empty(int stage) const { return full(stages + stage); }

  // By one thread; the block must then be synchronised.
  __device__ void init(int fillers, int readers) const {
    for (int s = 0; s < stages; ++s) {
      barrier_init(full(s), fillers);
      barrier_init(empty(s), readers);
    }
    fence_barrier_init();
  }
  __device__ void wait_empty(const Place<stages>& at) const { barrier_wait(empty(at.stage), at.parity ^ 1); }
  __device__ void wait_full(const Place<stages>& at) const { barrier_wait(full(at.stage), at.parity); }
  // By all lanes, of which one arrives: `readers` is a number of warps. Right behind wgmma_wait, which holds back the
  // whole warp until its products have read the stage; ordinary reads of it would need a __syncwarp in between.
  __device__ void release(int stage) const {
    if (lane() == 0) barrier_arrive(empty(stage));
  }
};

// ---- a block: one warpgroup that loads, two that multiply ----

constexpr int warpgroup = 128;
constexpr int math_warpgroups = 2;
constexpr int math_threads = math_warpgroups * warpgroup;
constexpr int gemm_threads = warpgroup + math_threads;

}  // namespace xt::cuda
