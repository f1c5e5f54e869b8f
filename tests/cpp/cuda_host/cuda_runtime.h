// A small double of the CUDA runtime for the tests: found before the real header, it lets a host compiler build the
// same .cu sources, and machine.h runs their kernels. Only what csrc/cuda uses is here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static  // blocks run one after another; machine.cpp knows these variables by their addresses

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// threadIdx.x and its like ask the machine, whichever fibre runs.
template <unsigned (*get)()>
struct XtCoordinate {
  struct {
    operator unsigned() const { return get(); }
  } x;
};
inline constexpr XtCoordinate<cuda_host::thread_index> threadIdx{};
inline constexpr XtCoordinate<cuda_host::block_index> blockIdx{};
inline constexpr XtCoordinate<cuda_host::block_size> blockDim{};
inline constexpr XtCoordinate<cuda_host::grid_size> gridDim{};

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// ---- host side ----
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t e) { return e ? "invalid configuration argument" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cuda_host::current_device() = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_host::Gpu& gpu = cuda_host::gpu();
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? gpu.compute_capability_major : gpu.multiprocessors;
  return cudaSuccess;
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes > cuda_host::most_shared_bytes) return cudaErrorInvalidValue;
  cuda_host::shared_limit(reinterpret_cast<void*>(kernel)) = bytes;
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  const auto limit = static_cast<size_t>(cuda_host::shared_limit(reinterpret_cast<void*>(kernel)));
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call = {kernel, {static_cast<Params>(args)...}};
  cuda_host::launch(blocks, threads, config->dynamicSmemBytes, &call, sizeof call, [](void* c) {
    std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->params);
  });
  return cudaSuccess;
}

// ---- device side ----
#define __syncthreads() cuda_host::sync_block(__FILE__, __LINE__)
#define __nanosleep(ns) cuda_host::nap()
#define __threadfence_system() static_cast<void>(0)  // memory is one, and accesses happen in order
#define __syncwarp() cuda_host::sync_warp(__FILE__, __LINE__)

namespace cuda_host {

template <class T>
uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T v, int from) {
  return cuda_host::from_bits<T>(cuda_host::exchange(mask, cuda_host::to_bits(v), from & 31));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int step) {
  return __shfl_sync(mask, v, cuda_host::lane_index() ^ step);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned step) {
  const int lane = cuda_host::lane_index(), from = lane - static_cast<int>(step);
  return __shfl_sync(mask, v, from < 0 ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, bool v) { return cuda_host::ballot(mask, v); }
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  return cuda_host::match_any(mask, cuda_host::to_bits(v));
}

inline int32_t atomicAdd(int32_t* p, int32_t v) { return cuda_host::atomic_add(p, v); }
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long v) {
  return cuda_host::atomic_min(p, v);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
// Byte i of the result is the byte of low, high (numbers 0 to 3, 4 to 7) that hexadecimal digit i of `digits` names.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned digits) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (digits >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline float __uint_as_float(unsigned v) { return cuda_host::from_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return static_cast<unsigned>(cuda_host::to_bits(v)); }
// Documented: 0 for a finite a and |b| above 2^126.
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0 : a / b; }
