// Loops over a row in whole vectors and what is left of it.
#pragma once
#include "cpu/simd/bf16.h"

namespace xt::cpu {

struct Whole {};

static XT_INLINE float value(const float* p) { return *p; }
static XT_INLINE float value(const bf16_t* p) { return widen(*p); }

template <class Vec, class T>
XT_INLINE Vec load(const T* p, Whole) {
  return Vec::load(p);
}
template <class Vec, class T>
XT_INLINE Vec load(const T* p, int n) {
  return Vec::load(p, n);
}
template <class Vec, class T>
XT_INLINE void store(Vec v, T* p, Whole) {
  v.store(p);
}
template <class Vec, class T>
XT_INLINE void store(Vec v, T* p, int n) {
  v.store(p, n);
}

// body(i, n) for each vector of a row of `width`: n is Whole, or the number of elements left for the last one.
template <class Vec, class Body>
XT_INLINE void each_vector(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + Vec::width <= width; i += Vec::width) body(i, Whole{});
  if (i < width) body(i, static_cast<int>(width - i));
}

}  // namespace xt::cpu
