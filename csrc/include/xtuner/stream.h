// Where and with how much of the machine a kernel runs.
#pragma once
#include <cstdint>

namespace xt {

struct Stream {
  void* handle = nullptr;     // cudaStream_t or aclrtStream of the tensors' device; null on CPU
  int num_threads = 1;        // CPU only: at most this many threads, the caller included; never changes the result
  uint64_t* fault = nullptr;  // devices only: where kernels note bad values (device_fault.h); null: not noted
};

}  // namespace xt
