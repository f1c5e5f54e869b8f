// Where and with how much of the machine a kernel runs.
#pragma once

namespace xt {

struct Stream {
  void* handle = nullptr;  // cudaStream_t or aclrtStream of the tensors' device; null on CPU
  int num_threads = 1;     // CPU only: at most this many threads, the caller included; never changes the result
};

}  // namespace xt
