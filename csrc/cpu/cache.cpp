#include "cpu/cache.h"

#include <fstream>

#include "cpu/rows.h"

namespace xt::cpu {

int64_t last_level_cache() {
  // Linux's file and not sysconf(), which adds up all the caches of some processors that no single core can use.
  static const int64_t bytes = [] {
    int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;  // "32768K"
    return kib > 0 ? kib << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

bool worth_streaming(const Tensor& out) {
  const int64_t line = 64, bytes = out.shape[0] * row_bytes(out);
  const bool whole_lines = reinterpret_cast<uintptr_t>(out.data) % line == 0 && row_bytes(out) % line == 0;
  return whole_lines && bytes >= last_level_cache() / 2;
}

}  // namespace xt::cpu
