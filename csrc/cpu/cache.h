// What the kernels know of the machine's caches.
#pragma once
#include "xtuner/tensor.h"

namespace xt::cpu {

// Bytes of the last-level cache, or a guess of 32 MiB where the system does not say.
int64_t last_level_cache();

// An output so large that most of it leaves the cache before anybody reads it is better written past the cache: that
// saves fetching its lines first. Its rows must be whole, aligned cache lines.
bool worth_streaming(const Tensor& out);

}  // namespace xt::cpu
