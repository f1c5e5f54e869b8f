#include "cpu/cache.h"

#include <unistd.h>

#include "cpu/rows.h"

namespace xt::cpu {

int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

bool worth_streaming(const Tensor& out) {
  const int64_t line = 64, bytes = out.shape[0] * row_bytes(out);
  const bool whole_lines = reinterpret_cast<uintptr_t>(out.data) % line == 0 && row_bytes(out) % line == 0;
  return whole_lines && bytes >= last_level_cache() / 2;
}

}  // namespace xt::cpu
