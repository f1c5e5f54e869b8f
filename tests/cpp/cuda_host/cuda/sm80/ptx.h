// The double of csrc/cuda/sm80/ptx.h.
#pragma once
#include "async.h"
#include "cuda_runtime.h"

namespace xt::cuda {

constexpr int shared_slack = 1024;
inline uint32_t dynamic_shared() { return cuda_host::dynamic_shared(); }

inline void copy_async(uint32_t to, const void* from, bool real) { cuda_host::copy_async(to, from, real); }
inline void copy_async_commit() { cuda_host::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  cuda_host::copy_async_wait(pending);
}
template <bool transposed>
void load_matrices(uint32_t (&to)[4], uint32_t row) {
  cuda_host::load_matrices(to, row, transposed);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_host::mma_bf16(d, a, b0, b1);
}

}  // namespace xt::cuda
