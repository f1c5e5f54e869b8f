// Instructions of compute capability 9.0a (Hopper): barriers in shared memory, copies of tensor tiles (TMA) and
// products by warpgroups (wgmma). One function per instruction, nothing else; semantics as in the PTX manual.
#pragma once
#include <cuda.h>

#include "cuda/sm80/ptx.h"
#include "cuda/sm90/operand.h"
#include "xtuner/tensor.h"

namespace xt::cuda {

// ---- barriers: 8 bytes of shared memory ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and the phase also waits for so many bytes of tile copies.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. A new barrier counts as if the phase of parity 1 were over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!over);
}
// Of `threads` threads, whole warps; 0 belongs to __syncthreads.
template <int id, int threads>
__device__ __forceinline__ void sync_named() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

// ---- between ordinary accesses to shared memory and those of copies and products ----

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void store_zeros(uint32_t to) {  // 16 bytes
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// ---- ordinary reads of shared memory ----

__device__ __forceinline__ float load_shared(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void load_shared(uint32_t from, float (&x)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from) : "memory");
}

// ---- tile copies: the whole box arrives, zeros where it leaves the tensor ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
               "l"(&map), "r"(barrier), "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                          int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
               "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// ---- registers of a warpgroup: a multiple of 8 per thread ----

template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- products of operands in shared memory ----

// Before the first product, and after sums were touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last `pending` groups are done: they no longer read shared memory.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// The compiler takes sums for finished as soon as a product is issued: keeps what uses them behind the wait before.
template <int blocks>
__device__ __forceinline__ void sums_ready(float (&d)[blocks][4]) {
#pragma unroll
  for (int j = 0; j < blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[j][i])::"memory");
  }
}

#define XT_SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define XT_SUMS_16(j) XT_SUMS_4(j), XT_SUMS_4(j + 1), XT_SUMS_4(j + 2), XT_SUMS_4(j + 3)
#define XT_SUMS_64(j) XT_SUMS_16(j), XT_SUMS_16(j + 4), XT_SUMS_16(j + 8), XT_SUMS_16(j + 12)
#define XT_NAMES_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63}, "
#define XT_NAMES_128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
  "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "

// d[64, 8 * blocks] (+)= a[64, 16] b[16, 8 * blocks] by a warpgroup, bfloat16 with fp32 sums: warp w holds rows
// 16w..16w+15, blocks of 8 columns each laid out as in mma_bf16. Operands lie along k, or along m and n.
template <bool a_along_m, bool b_along_n>
__device__ __forceinline__ void wgmma_bf16(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               "setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " XT_NAMES_64
               "%64, %65, p, 1, 1, %67, %68;\n"
               "}"
               : XT_SUMS_64(0)
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(a_along_m), "n"(b_along_n));
}
template <bool a_along_m, bool b_along_n>
__device__ __forceinline__ void wgmma_bf16(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               "setp.ne.b32 p, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " XT_NAMES_128
               "%128, %129, p, 1, 1, %131, %132;\n"
               "}"
               : XT_SUMS_64(0), XT_SUMS_64(16)
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(a_along_m), "n"(b_along_n));
}

// The same in float8, d[64, 128] (+)= a[64, 32] b[32, 128], each operand in its own format; both lie along k.
#define XT_WGMMA_FP8(A, B) \
  __device__ __forceinline__ void wgmma_fp8(A##_t, B##_t, float (&d)[16][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile("{\n" \
                 ".reg .pred p;\n" \
                 "setp.ne.b32 p, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32." #A "." #B " " XT_NAMES_64 "%64, %65, p, 1, 1;\n" \
                 "}" \
                 : XT_SUMS_64(0) \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add))); \
  }
XT_WGMMA_FP8(e4m3, e4m3)
XT_WGMMA_FP8(e4m3, e5m2)
XT_WGMMA_FP8(e5m2, e4m3)
XT_WGMMA_FP8(e5m2, e5m2)
#undef XT_WGMMA_FP8

#undef XT_SUMS_4
#undef XT_SUMS_16
#undef XT_SUMS_64
#undef XT_NAMES_64
#undef XT_NAMES_128

}  // namespace xt::cuda
