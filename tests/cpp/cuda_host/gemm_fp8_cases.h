// One float8 grouped product on the double, compared with the CPU core. Throws Mismatch, or the machine throws Violation.
#pragma once
#include "cases.h"

namespace xt::test {

struct Fp8Case {
  std::vector<int64_t> rows;  // of each expert
  int64_t n = 128;
  DType a = DType::e4m3, b = DType::e4m3, out = DType::bf16;
  std::string name() const;
};

struct MFp8Case : Fp8Case {
  int64_t k = 128, tail = 0;      // tail: rows of nobody
  int64_t ld = 0;                 // of scale_a, if not the one of quantize_1x128
  bool swapped_scales = false;    // scale_b is a transposed view
};

struct KFp8Case : Fp8Case {
  int64_t m = 128;
  bool accumulate = false;
};

void m_grouped_fp8_case(Rng& rng, const MFp8Case& c);
void k_grouped_fp8_case(Rng& rng, const KFp8Case& c);

}  // namespace xt::test
