// Tensors of the test as a real GPU sees them, with the interface of the double's device.h: the same memory, which
// managed_memory.cpp has taken from the GPU's driver.
#pragma once
#include <cuda_runtime_api.h>

#include <cstring>
#include <functional>
#include <memory>

#include "helpers.h"
#include "xtuner/device_fault.h"
#include "xtuner/stream.h"

namespace xt::test {

class OnMachine {
 public:
  ~OnMachine() { EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError()); }

  Tensor in(const char*, const Tensor& t) { return on_gpu(t); }
  Tensor in_out(const char*, const Tensor& t) { return on_gpu(t); }
  // Poisoned: what the op does not write shows.
  Tensor out(const char*, const Tensor& t) {
    if (t.numel()) std::memset(t.data, 0xff, static_cast<size_t>(t.numel() * size_of(t.dtype)));
    return on_gpu(t);
  }
  Tensor in_up_to(const char*, const Tensor& t, int64_t) { return on_gpu(t); }
  Stream stream() {
    Stream s;
    s.fault = fault_.get();
    return s;
  }
  uint64_t fault() const { return *fault_; }

 private:
  static Tensor on_gpu(Tensor t) {
    t.device = {DeviceType::cuda, 0};
    return t;
  }

  std::unique_ptr<uint64_t> fault_ = std::make_unique<uint64_t>(no_fault);
};

// A GPU has an order of its own.
inline void for_each_schedule(const std::function<void()>& body) { body(); }

inline bool cpu_fuses() { return build_info().isa != "portable"; }

}  // namespace xt::test

// What tests tell the double about itself. A real GPU is what it is.
namespace cuda_host {

struct Gpu {
  int compute_capability_major = 0, multiprocessors = 0;
};
inline Gpu& gpu() {
  static Gpu gpu;
  return gpu;
}
inline void set_schedule(unsigned) {}

}  // namespace cuda_host
