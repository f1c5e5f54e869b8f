// What a whole row adds up to, and its largest number.
#pragma once
#include <type_traits>

#include "cpu/simd/each_vector.h"

namespace xt::cpu {

// The largest of n numbers; a NaN may be passed over.
template <class Vec, class T>
XT_INLINE float largest(const T* x, int64_t n) {
  float most = -__builtin_inff();
  int64_t i = 0;
  if (n >= Vec::width) {
    Vec lanes = Vec::load(x);
    for (i = Vec::width; i + Vec::width <= n; i += Vec::width) {
      const Vec v = Vec::load(x + i);
      lanes = select_gt(v, lanes, v, lanes);
    }
    float each[Vec::width];
    lanes.store(each);
    for (float v : each) most = v > most ? v : most;
  }
  for (; i < n; ++i) most = value(x + i) > most ? value(x + i) : most;
  return most;
}

// Sum over a row of f(i, n), see each_vector: of the last vector only the first n lanes count.
template <class Vec, class F>
XT_INLINE float sum_of_row(int64_t width, F f) {
  Vec total = Vec::zero();
  float rest = 0;
  each_vector<Vec>(width, [&](int64_t i, auto n) {
    const Vec v = f(i, n);
    if constexpr (std::is_same_v<decltype(n), Whole>) {
      total = total + v;
    } else {
      float each[Vec::width];
      v.store(each);
      for (int j = 0; j < n; ++j) rest += each[j];
    }
  });
  return sum(total) + rest;
}

}  // namespace xt::cpu
