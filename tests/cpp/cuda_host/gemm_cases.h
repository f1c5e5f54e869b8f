// One grouped product on the double, compared with the CPU core. Throws Mismatch, or the machine throws Violation.
#pragma once
#include "cases.h"

namespace xt::test {

struct GemmCase {
  std::vector<int64_t> rows;  // of each expert
  int64_t tail = 0, n = 8;
  DType in = DType::bf16, out = DType::bf16;
  int64_t per_token = 0;  // choices per token of a map; 0: no map
  std::string name() const;
};

struct MCase : GemmCase {
  int64_t k = 8;
  bool trans_b = true, bias = false, swiglu = false;
};

struct KCase : GemmCase {
  int64_t m = 8;
  bool accumulate = false;
};

// n and k are I and D; `out` is not looked at.
struct DswigluCase : GemmCase {
  int64_t k = 8;
  bool weighted = false;
};

void m_grouped_case(Rng& rng, const MCase& c);
void k_grouped_case(Rng& rng, const KCase& c);
void dswiglu_case(Rng& rng, const DswigluCase& c);

}  // namespace xt::test
