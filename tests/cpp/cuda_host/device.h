// Tensors of the test as the device sees them: the same memory, known to the machine for as long as this object lives.
#pragma once
#ifdef XT_ON_GPU  // the same tests on a real one
#include "cuda_device/device.h"
#else
#include <deque>

#include "helpers.h"
#include "machine.h"
#include "memory.h"
#include "xtuner/device_fault.h"
#include "xtuner/stream.h"

namespace xt::test {

class OnMachine {
 public:
  OnMachine() { buffers_.emplace_back("fault", &fault_, sizeof fault_, sizeof fault_, cuda_host::Buffer::Use::in_out); }

  Tensor in(const char* name, const Tensor& t) { return add(name, t, cuda_host::Buffer::Use::input); }
  Tensor out(const char* name, const Tensor& t) { return add(name, t, cuda_host::Buffer::Use::output); }
  Tensor in_out(const char* name, const Tensor& t) { return add(name, t, cuda_host::Buffer::Use::in_out); }
  // An input of which rows from `row` on must not be read.
  Tensor in_up_to(const char* name, const Tensor& t, int64_t row) {
    const Tensor d = in(name, t);
    const size_t row_bytes = static_cast<size_t>(t.shape[1] * size_of(t.dtype));
    buffers_.back().forbid_reading(static_cast<size_t>(row) * row_bytes, static_cast<size_t>(t.shape[0]) * row_bytes);
    return d;
  }
  Stream stream() {
    Stream s;
    s.fault = &fault_;
    return s;
  }
  uint64_t fault() const { return fault_; }

 private:
  Tensor add(const char* name, Tensor t, cuda_host::Buffer::Use use) {
    const auto element = static_cast<size_t>(size_of(t.dtype));
    buffers_.emplace_back(name, t.data, static_cast<size_t>(t.numel()) * element, element, use);
    t.device = {DeviceType::cuda, 1};
    return t;
  }

  uint64_t fault_ = no_fault;
  std::deque<cuda_host::Buffer> buffers_;
};

// Runs body with the threads of a block taken in several orders.
inline void for_each_schedule(const std::function<void()>& body) {
  for (unsigned seed : {0u, 1u, 2u}) {
    SCOPED_TRACE("schedule " + std::to_string(seed));
    cuda_host::set_schedule(seed);
    body();
  }
  cuda_host::set_schedule(0);
}

// Whether the instruction set in use on the CPU has the fused multiply-add that the CUDA kernels use.
inline bool cpu_fuses() { return build_info().isa != "portable"; }

}  // namespace xt::test

#endif
