// What was compiled into this library and what of it the machine can run.
#pragma once
#include <string>
#include <vector>

namespace xt {

struct BuildInfo {
  std::string version;            // of the package, x.y.z
  std::string compiler;           // name and version of the C++ compiler
  bool cpu, cuda, ascend;         // kernels of this backend are in the library
  std::string isa;                // instruction set that CPU kernels use now
  std::vector<std::string> isas;  // instruction sets built in that this machine can run, slowest first
};

BuildInfo build_info();

// For tests: run CPU kernels with this instruction set (one of BuildInfo::isas); empty for the best one again.
// Throws Error when it is not built or this machine cannot run it. Affects all threads.
void force_isa(const std::string& name);

}  // namespace xt
