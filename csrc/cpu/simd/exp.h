#pragma once
#include "cpu/simd/inline.h"

namespace xt::cpu {

// e^x, relative error below 2e-7. Results under 1.2e-38 become that, results over 1.7e38 become +inf; NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2 (ln2 in two parts, Cody and Waite), then Taylor's series of e^r to r^7 / 7!.
template <class Vec>
XT_INLINE Vec exp(Vec x) {
  const Vec low = Vec::all(-87.33f), high = Vec::all(89.0f);
  x = select_gt(low, x, low, select_gt(x, high, high, x));
  const Vec shift = Vec::all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec biased = fma(x, Vec::all(1.44269504088896f), shift);
  const Vec n = biased - shift;
  Vec r = fma(n, Vec::all(-0.693359375f), x);
  r = fma(n, Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.0f / 5040);
  p = fma(p, r, Vec::all(1.0f / 720));
  p = fma(p, r, Vec::all(1.0f / 120));
  p = fma(p, r, Vec::all(1.0f / 24));
  p = fma(p, r, Vec::all(1.0f / 6));
  p = fma(p, r, Vec::all(0.5f));
  p = fma(p * r, r, r) + Vec::all(1.0f);
  return p * exp2_of_biased(biased);
}

}  // namespace xt::cpu
