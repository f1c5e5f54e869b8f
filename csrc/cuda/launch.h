// Putting a kernel on a stream, and what a kernel does about a bad value.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "xtuner/device_fault.h"
#include "xtuner/error.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt::cuda {

constexpr int warp_size = 32;
constexpr int block_threads = 256;  // of every kernel that says nothing else
constexpr unsigned all_lanes = 0xffffffffu;

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) fail(op, ": CUDA error: ", cudaGetErrorString(status));
}

// Makes the tensors' device current, as a stream must be used on its own device, and the previous one again at the end.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& t) : wanted_(t.device.index) {
    check(op, cudaGetDevice(&previous_));
    if (previous_ != wanted_) check(op, cudaSetDevice(wanted_));
  }
  ~OnDevice() {
    if (previous_ != wanted_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int wanted_, previous_ = 0;
};

// With so many bytes of dynamic shared memory. No blocks: nothing to do. More blocks than a grid holds: kernels stride
// over their work, whatever the grid.
template <class... Params, class... Args>
void launch_with_shared(const char* op, Stream stream, int64_t blocks, int threads, int shared_bytes,
                        void (*kernel)(Params...), const Args&... args) {
  if (blocks == 0) return;
  if (shared_bytes > 48 << 10) {  // more must be asked for
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 0x7fffffff)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

template <class... Params, class... Args>
void launch(const char* op, Stream stream, int64_t blocks, int threads, void (*kernel)(Params...),
            const Args&... args) {
  launch_with_shared(op, stream, blocks, threads, 0, kernel, args...);
}

// Blocks of block_threads that hold so many warps.
inline int64_t blocks_of_warps(int64_t warps) {
  constexpr int64_t per_block = block_threads / warp_size;
  return (warps + per_block - 1) / per_block;
}

inline int device_attribute(const char* op, const Tensor& t, cudaDeviceAttr attribute) {
  int value = 0;
  check(op, cudaDeviceGetAttribute(&value, attribute, t.device.index));
  return value;
}

__device__ inline void note(uint64_t* fault, Fault kind, int64_t index) {
  if (!fault) return;
  atomicMin(reinterpret_cast<unsigned long long*>(fault), static_cast<unsigned long long>(fault_word(kind, index)));
}

// This thread's warp among all warps of the grid, and how many there are.
__device__ inline int64_t grid_warp() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / warp_size) + threadIdx.x / warp_size;
}
__device__ inline int64_t grid_warps() { return static_cast<int64_t>(gridDim.x) * (blockDim.x / warp_size); }
__device__ inline int lane() { return static_cast<int>(threadIdx.x) % warp_size; }

// The sum of v over this lane and those before it.
template <class T>
__device__ T inclusive_sum(T v) {
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const T before = __shfl_up_sync(all_lanes, v, step);
    if (lane() >= step) v += before;
  }
  return v;
}

}  // namespace xt::cuda
