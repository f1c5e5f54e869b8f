#include <atomic>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "xtuner/build_info.h"

namespace xt {
namespace cpu {
namespace {

#ifdef XT_X86
const Kernels& kernels_avx512bf16() {
  static const Kernels table = [] {
    Kernels k = kernels_avx512;
    use_avx512bf16(k);
    return k;
  }();
  return table;
}
#endif

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found = {&kernels_portable};
#ifdef XT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&kernels_avx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16());
  }
#endif
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{usable().back()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace cpu

void force_isa(const std::string& name) {
  const auto found = cpu::usable();
  std::string names;
  for (const cpu::Kernels* k : found) {
    if (name == k->name || (name.empty() && k == found.back())) {
      cpu::current().store(k);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  fail("force_isa: name must be one of ", names, " on this machine, got '", name, "'");
}

BuildInfo build_info() {
  BuildInfo info;
  info.version = XT_VERSION;
#if defined(__clang__)
  info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "gcc " __VERSION__;
#else
  info.compiler = "unknown";
#endif
  info.cpu = true;
#ifdef XT_CUDA
  info.cuda = true;
#else
  info.cuda = false;
#endif
  info.ascend = false;
  info.isa = cpu::kernels().name;
  for (const cpu::Kernels* k : cpu::usable()) info.isas.emplace_back(k->name);
  return info;
}

}  // namespace xt
