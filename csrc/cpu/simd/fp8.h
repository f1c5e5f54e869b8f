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
  static constexpr float largest = 448.0f, half_unit = 256.0f;
  static constexpr int32_t special = 0x7f;   // first code that is no number, and the first NaN among those
  static constexpr int32_t nan = 0x7f;
};
template <>
struct Fp8<e5m2_t> {
  static constexpr int mantissa = 2, bias = 15;
  static constexpr float largest = 57344.0f, half_unit = 1.0f;
  static constexpr int32_t special = 0x7c;
  static constexpr int32_t nan = 0x7d;
};

// Shifted by `shift`, a code's exponent and mantissa stand where a float has them; the exponent is then `rebias` short.
template <class F>
struct Fp8Bits {
  static constexpr int shift = 23 - Fp8<F>::mantissa;
  static constexpr int32_t rebias = (127 - Fp8<F>::bias) << 23;
  static constexpr int32_t smallest_normal = rebias + (1 << 23);  // 2^(1 - bias), as a float's bits
  // Numbers come to fp8_codes_256() times 2^lift, so that the exponent of the smallest normal number, `shift` higher,
  // ends in as many zeros as a code's exponent has bits. (Not far up, lest 1 / scale overflows.)
  static constexpr int exponent_bits = 7 - Fp8<F>::mantissa;
  static constexpr int lifted = ((smallest_normal >> 23) + shift + (1 << (exponent_bits - 2))) >> exponent_bits
                                << exponent_bits;
  static constexpr int lift = lifted - shift - (smallest_normal >> 23);
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

// Codes in the upper bytes of 16-bit lanes, whose lower bytes hold anything, as half-precision numbers times half_unit.
// Half precision keeps subnormal numbers in every mode. e5m2 is its upper byte; e4m3 has another bias and no infinity.
template <class F, class Shorts>
XT_INLINE Shorts fp8_halves(Shorts code) {
  if constexpr (Fp8<F>::half_unit == 1) return code & -0x100;
  const Shorts half = (code >> 1) & -0x4080;
  return half | ((half + 0x80) & 0x4000);  // all ones become NaN
}

// 256 times the codes of x / 2^lift, for x >= 0 that round to at most the largest number.
// Added to a power of two 2^shift times its own (or the smallest normal number's, where that is more), x is rounded to
// the format, and the sum's low bits hold how often the unit of that exponent goes into it. The sum's exponent times
// 2^mantissa plus that number is the code, but for an offset, which the power of two carries in its low half.
template <class F, class Vec>
XT_INLINE typename Vec::Ints fp8_codes_256(Vec x) {
  using Ints = typename Vec::Ints;
  using Floats = typename Vec::Floats;
  using Bits = Fp8Bits<F>;
  constexpr int32_t smallest = Bits::smallest_normal + Bits::lift * (1 << 23);
  constexpr int32_t base = (Bits::lifted << 23) + (1 << 16) - (Bits::lifted << Fp8<F>::mantissa);
  const Ints power = Vec::template exceed<smallest, base>((Ints)x.v);
  const Ints sum = (Ints)((Floats)x.v + (Floats)power);
  return Vec::template add_halves<256, (2 << Fp8<F>::mantissa)>(sum);
}

}  // namespace xt::cpu
