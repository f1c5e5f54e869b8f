// One bfloat16 at a time: exact widening; narrowing rounds to nearest, ties to even; NaN stays NaN (made quiet).
#pragma once
#include <cstdint>

#include "cpu/simd/inline.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

static XT_INLINE float widen(bf16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

static XT_INLINE bf16_t narrow(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace xt::cpu
