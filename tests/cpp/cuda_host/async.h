// What runs beside a block's threads: copies into shared memory, products by warpgroups, barriers that they signal.
// When they take effect is up to the machine: at once, or as late as the rules allow (set_schedule), so that a kernel
// that does not wait for them, or that reuses their memory too early, computes something else.
//
// Dynamic shared memory is addressed by 32 bits. It starts as NaN. What ordinary accesses wrote must be fenced before
// copies or products see it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_host {

uint32_t dynamic_shared();

// ---- compute capability 8.0 ----
void copy_async(uint32_t to, const void* from, bool real);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrices(uint32_t* to, uint32_t row, bool transposed);
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

// ---- compute capability 9.0 ----
struct TensorMap {  // what the driver puts into a descriptor
  const char* data;
  int element_bytes, rank;
  uint64_t dims[5], strides[5];  // strides in bytes, of all dims
  uint32_t box[5];
  bool swizzled;
};

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int expect_bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void sync_named(int id, int threads);
void fence_proxy_async();
void store_zeros(uint32_t to);
void load_shared(uint32_t from, float* x, int count);
void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, const int* coordinates, int rank);

enum class Format { bf16, e4m3, e5m2 };
// d[64, 8 * blocks] (+)= a b over 32 bytes of k.
struct WgmmaOperand {
  uint64_t descriptor;
  Format format;
  bool along_mn;  // else along k
};
void wgmma(float* d, int blocks, WgmmaOperand a, WgmmaOperand b, bool add);
void wgmma_commit();
void wgmma_wait(int pending);

// ---- for machine.cpp ----
void start_async_block(size_t dynamic_shared_bytes);
bool finish_one_copy();        // a late tile copy takes effect; false: none is on its way
bool barrier_over(uint32_t barrier, uint32_t parity);
const char* unfinished();      // what the block's end leaves behind; null: nothing

}  // namespace cuda_host
