#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/each_vector.h"

namespace xt::cpu {

template <class Vec, class T>
void rotary_typed(const RotaryTokens& a, int64_t begin, int64_t end) {
  const Vec sign = Vec::all(a.back ? -1.0f : 1.0f);
  for (int64_t t = begin; t < end; ++t) {
    const T* cos = static_cast<const T*>(a.cos) + t * a.half;
    const T* sin = static_cast<const T*>(a.sin) + t * a.half;
    for (int64_t h = t * a.num_heads; h < (t + 1) * a.num_heads; ++h) {
      const T* x = static_cast<const T*>(a.x) + h * 2 * a.half;
      T* out = static_cast<T*>(a.out) + h * 2 * a.half;
      each_vector<Vec>(a.half, [&](int64_t i, auto n) {
        const Vec first = load<Vec>(x + i, n), second = load<Vec>(x + a.half + i, n);
        const Vec c = load<Vec>(cos + i, n), s = load<Vec>(sin + i, n) * sign;
        store(first * c - second * s, out + i, n);
        store(second * c + first * s, out + a.half + i, n);
      });
    }
  }
}

template <class Vec>
void rotary_tokens(const RotaryTokens& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? rotary_typed<Vec, float>(a, begin, end) : rotary_typed<Vec, bf16_t>(a, begin, end);
}

}  // namespace xt::cpu
