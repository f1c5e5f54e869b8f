#pragma once
#include "cpu/simd/inline.h"

namespace xt::cpu {

// 2^x for x <= 127, relative error below 2e-7 beside that of x; exactly 1 at 0, exactly 0 below -126; NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f is the degree 5 polynomial with 2^0 = 1 whose largest relative error is least.
template <class Vec>
XT_INLINE Vec exp2(Vec x) {
  const Vec shift = Vec::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec biased = x + shift;
  const Vec f = x - (biased - shift);
  Vec p = Vec::all(1.326472731e-3f);
  p = fma(p, f, Vec::all(9.671512991e-3f));
  p = fma(p, f, Vec::all(5.550733581e-2f));
  p = fma(p, f, Vec::all(2.402224243e-1f));
  p = fma(p, f, Vec::all(6.931470037e-1f));
  p = fma(p, f, Vec::all(1.0f));
  return select_gt(Vec::all(-126.0f), x, Vec::zero(), p * exp2_of_biased(biased));
}

}  // namespace xt::cpu
