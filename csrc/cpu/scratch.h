// Memory a kernel works in, one piece per thread, kept from call to call.
#pragma once
#include <cstdint>

namespace xt::cpu {

// At least this many floats, 64-byte aligned, uninitialised; valid until the same thread asks again.
float* thread_scratch(int64_t floats);

}  // namespace xt::cpu
