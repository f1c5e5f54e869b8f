// Instructions of compute capability 8.0 that CUDA C++ has no words for. Shared memory is addressed by 32 bits here.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace xt::cuda {

// The block's dynamic shared memory, at a multiple of 1024 bytes; launches ask for `shared_slack` bytes more.
constexpr int shared_slack = 1024;
__device__ __forceinline__ uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023u) & ~1023u;
}

// 16 bytes from global to shared memory, in the background: zeros where `real` is false, and nothing is read then.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last `pending` groups that this thread committed have arrived.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane l names row l%8 of matrix l/8. Lane l receives elements (l/4, 2(l%4)) and
// the next one along the row, or, transposed, (2(l%4), l/4) and the next one along the column.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  }
}

// d[16, 8] += a[16, 16] b[16, 8], bfloat16 with fp32 sums. With g = lane/4 and q = lane%4 a lane holds
// d: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1);  a: pairs along k at (g, 2q), (g+8, 2q), (g, 2q+8), (g+8, 2q+8);
// b: pairs along k at (2q, g), (2q+8, g).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace xt::cuda
