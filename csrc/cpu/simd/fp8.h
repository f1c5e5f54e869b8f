// float8 <-> float. Widening is exact, NaN and infinities included. Narrowing rounds to nearest, ties to even,
// subnormals included, and is for numbers that fit: kernels scale first, and write `fp8_nan` where there is no number.
// One text for every instruction set, on the compiler's own vectors. No fp32 number in it is subnormal unless the input
// is one that rounds to zero, so that flush-to-zero modes change nothing.
#pragma once
#include "cpu/simd/inline.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

constexpr int fp8_nan = 0x7f;  // a NaN in both formats

template <class F>
struct Fp8;
template <>
struct Fp8<e4m3_t> {
  static constexpr int mantissa = 3, bias = 7;
  static constexpr float largest = 448.0f;
  static constexpr int32_t special = 0x7f;   // first code that is no number, and the first NaN among those
  static constexpr int32_t nan = 0x7f;
};
template <>
struct Fp8<e5m2_t> {
  static constexpr int mantissa = 2, bias = 15;
  static constexpr float largest = 57344.0f;
  static constexpr int32_t special = 0x7c;
  static constexpr int32_t nan = 0x7d;
};

// Shifted by `shift`, a code's exponent and mantissa stand where a float has them; the exponent is then `rebias` short.
template <class F>
struct Fp8Bits {
  static constexpr int shift = 23 - Fp8<F>::mantissa;
  static constexpr int32_t rebias = (127 - Fp8<F>::bias) << 23;
  static constexpr int32_t smallest_normal = rebias + (1 << 23);  // 2^(1 - bias), as a float's bits
  // Added to a positive float below the smallest normal number, it leaves in the sum's low bits how often the smallest
  // subnormal number goes into that float, rounded.
  static constexpr int32_t rounder = rebias + ((shift + 1) << 23);
};

// The numbers of codes in the low bytes of otherwise empty lanes; all of them are bfloat16 numbers, too.
template <class F, class Vec>
XT_INLINE Vec fp8_values(typename Vec::Ints code) {
  using Ints = typename Vec::Ints;
  using Floats = typename Vec::Floats;
  using Bits = Fp8Bits<F>;
  const Ints size = code & 0x7f;
  // A subnormal number is read as if its exponent were 1 and it had the leading one that it lacks, then loses that one.
  const Ints subnormal = size < (1 << Fp8<F>::mantissa);
  Ints bits = (size << Bits::shift) + Bits::rebias + (subnormal & (1 << 23));
  bits = (Ints)((Floats)bits - (Floats)(subnormal & Bits::smallest_normal));
  bits |= (size >= Fp8<F>::special) & 0x7f800000;
  bits |= (size >= Fp8<F>::nan) & 0x400000;
  return Vec::of(bits | (code & 0x80) << 24);
}

template <class Vec, class F>
XT_INLINE Vec load_fp8(const F* from) {
  return fp8_values<F, Vec>(Vec::load_bytes(&from->bits));
}

// Codes in the low bytes, for |x| that round to at most the largest number.
template <class F, class Vec>
XT_INLINE typename Vec::Ints fp8_codes(Vec x) {
  using Ints = typename Vec::Ints;
  using Floats = typename Vec::Floats;
  using Bits = Fp8Bits<F>;
  const Ints bits = (Ints)x.v, size = bits & 0x7fffffff;
  const Ints odd = (size >> Bits::shift) & 1;
  const Ints normal = (size + ((1 << (Bits::shift - 1)) - 1 - Bits::rebias) + odd) >> Bits::shift;
  const Ints rounder = Ints{} + Bits::rounder;
  const Ints subnormal = (Ints)((Floats)size + (Floats)rounder) - rounder;
  return (size < Bits::smallest_normal ? subnormal : normal) | ((bits >> 24) & 0x80);
}

}  // namespace xt::cpu
