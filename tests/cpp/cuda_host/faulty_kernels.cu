#include "faulty_kernels.h"

#include <cuda_runtime.h>

namespace xt::test {
namespace {

constexpr int threads = 64;

__device__ int32_t shared_memory(Faulty what, int t, int32_t value) {
  __shared__ int32_t a[threads];
  __shared__ int32_t count;
  if (what == Faulty::shared_uninitialised) return a[t];
  a[t] = value;
  switch (what) {
    case Faulty::nothing:
      if (t == 0) count = 0;
      __syncthreads();
      atomicAdd(&count, 1);
      __syncthreads();
      return a[threads - 1 - t] + count;
    case Faulty::shared_index: return a[t + threads * (value % 2)];
    case Faulty::no_block_barrier: return a[(t + 32) % threads];
    case Faulty::no_warp_barrier: return a[t ^ 1];
    case Faulty::warp_barrier: __syncwarp(); return a[t ^ 1];
    case Faulty::shuffle_is_no_barrier: return __shfl_xor_sync(~0u, value, 1) + a[t ^ 1];
    case Faulty::atomic_and_plain:
      atomicAdd(&a[t], 1);
      return a[(t + 32) % threads];
    default: return value;
  }
}

__global__ void faulty_kernel(Faulty what, const int32_t* values, int32_t* out, int64_t n, const int32_t* host) {
  const int t = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + t;
  int32_t v = values[what == Faulty::past_the_end ? i + n - threads : i];
  if (what == Faulty::never_written) v = out[i];
  if (what == Faulty::writes_an_input) const_cast<int32_t*>(values)[i] = 1;
  if (what == Faulty::misaligned) v = static_cast<int32_t>(__ldg(reinterpret_cast<const uint4*>(values + 1)).x);
  if (what == Faulty::barrier_in_a_branch && t < 48) __syncthreads();
  if (what == Faulty::two_barriers) {
    if (t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (what == Faulty::exit_before_barrier) {
    if (t == 5) return;
    __syncthreads();
  }
  if (what == Faulty::shuffle_without_a_lane && t % 32 != 3) v = __shfl_xor_sync(~0u, v, 1);
  if (what == Faulty::overflow) v = v + 0x7fffffff;
  if (what == Faulty::host_memory) v = *host;
  v = shared_memory(what, t, v);
  if (what == Faulty::same_element) {
    out[i / 2] = v;
  } else if (what == Faulty::same_element_across_blocks) {
    out[t] = v;
  } else {
    out[i] = v;
  }
}

}  // namespace

void run_faulty(Faulty what, const int32_t* values, int32_t* out, int64_t n, const int32_t* host) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(threads);
  cudaLaunchKernelEx(&config, faulty_kernel, what, values, out, n, host);
}

}  // namespace xt::test
