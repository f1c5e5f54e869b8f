// Two vectors of elements that are all treated alike: for bf16 one load, whose even and odd elements are widened
// without a shuffle, and one store. Which element sits where is the instruction set's own affair.
#pragma once
#include "cpu/simd/bf16.h"

namespace xt::cpu {

template <class Vec>
struct Pair {
  static constexpr int width = 2 * Vec::width;
  Vec a, b;

  static XT_INLINE Pair zero() { return {Vec::zero(), Vec::zero()}; }
  static XT_INLINE Pair load(const float* p) { return {Vec::load(p), Vec::load(p + Vec::width)}; }
  static XT_INLINE Pair load(const bf16_t* p) {
    Pair r;
    Vec::load_pair(p, r.a, r.b);
    return r;
  }
  // Stream: past the cache, where the memory is aligned to 64 bytes.
  template <bool Stream>
  XT_INLINE void store(float* p) const {
    if constexpr (Stream) {
      a.stream(p);
      b.stream(p + Vec::width);
    } else {
      a.store(p);
      b.store(p + Vec::width);
    }
  }
  template <bool Stream>
  XT_INLINE void store(bf16_t* p) const {
    if constexpr (Stream) {
      Vec::stream_pair(p, a, b);
    } else {
      Vec::store_pair(p, a, b);
    }
  }
};

template <class Vec>
XT_INLINE Pair<Vec> operator*(Vec x, Pair<Vec> y) {
  return {x * y.a, x * y.b};
}
template <class Vec>
XT_INLINE Pair<Vec> fma(Vec x, Pair<Vec> y, Pair<Vec> z) {
  return {fma(x, y.a, z.a), fma(x, y.b, z.b)};
}
template <class Vec>
XT_INLINE Pair<Vec> fma(Pair<Vec> x, Pair<Vec> y, Pair<Vec> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}

}  // namespace xt::cpu
