// The double of csrc/cuda/sm90/ptx.h.
#pragma once
#include "cuda.h"
#include "cuda/sm80/ptx.h"
#include "cuda/sm90/operand.h"
#include "xtuner/tensor.h"

namespace xt::cuda {

inline void barrier_init(uint32_t barrier, int arrivals) { cuda_host::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier) { cuda_host::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint32_t barrier, int bytes) { cuda_host::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { cuda_host::barrier_wait(barrier, parity); }
template <int id, int threads>
void sync_named() {
  cuda_host::sync_named(id, threads);
}

inline void fence_proxy_async() { cuda_host::fence_proxy_async(); }
inline void store_zeros(uint32_t to) { cuda_host::store_zeros(to); }

inline float load_shared(uint32_t from) {
  float x;
  cuda_host::load_shared(from, &x, 1);
  return x;
}
inline void load_shared(uint32_t from, float (&x)[2]) { cuda_host::load_shared(from, x, 2); }

inline void prefetch_map(const CUtensorMap&) {}
inline void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1) {
  const int at[2] = {c0, c1};
  cuda_host::load_tile(to, map.content, barrier, at, 2);
}
inline void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  const int at[4] = {c0, c1, c2, c3};
  cuda_host::load_tile(to, map.content, barrier, at, 4);
}

template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}

inline void wgmma_fence() {}
inline void wgmma_commit() { cuda_host::wgmma_commit(); }
template <int pending>
void wgmma_wait() {
  cuda_host::wgmma_wait(pending);
}
template <int blocks>
void sums_ready(float (&)[blocks][4]) {}

template <bool a_along_m, bool b_along_n, int blocks>
void wgmma_bf16(float (&d)[blocks][4], uint64_t a, uint64_t b, bool add) {
  constexpr auto bf16 = cuda_host::Format::bf16;
  cuda_host::wgmma(d[0], blocks, {a, bf16, a_along_m}, {b, bf16, b_along_n}, add);
}
inline cuda_host::Format format_of(e4m3_t) { return cuda_host::Format::e4m3; }
inline cuda_host::Format format_of(e5m2_t) { return cuda_host::Format::e5m2; }
template <class A, class B, int blocks>
void wgmma_fp8(A, B, float (&d)[blocks][4], uint64_t a, uint64_t b, bool add) {
  cuda_host::wgmma(d[0], blocks, {a, format_of(A{}), false}, {b, format_of(B{}), false}, add);
}

}  // namespace xt::cuda
