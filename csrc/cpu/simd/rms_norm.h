#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/each_vector.h"

namespace xt::cpu {

// As if stored in T and read again.
template <class Vec>
XT_INLINE Vec rounded_as(const float*, Vec v) {
  return v;
}
template <class Vec>
XT_INLINE Vec rounded_as(const bf16_t*, Vec v) {
  bf16_t t[Vec::width];
  v.store(t);
  return Vec::load(t);
}

template <class Vec, class T>
void rms_norm_typed(const RmsNormRows& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.width;
    T* out = static_cast<T*>(a.out) + r * a.width;
    Vec squares = Vec::zero();
    each_vector<Vec>(a.width, [&](int64_t i, auto n) {
      const Vec v = load<Vec>(x + i, n);
      squares = fma(v, v, squares);
    });
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.width) + a.eps);
    a.inverse_rms[r] = inverse;
    const Vec scale = Vec::all(inverse);
    each_vector<Vec>(a.width, [&](int64_t i, auto n) {
      store(rounded_as(x, load<Vec>(x + i, n) * scale) * load<Vec>(weight + i, n), out + i, n);
    });
  }
}

// With u = x * inverse_rms: dx = inverse_rms (dout w - u mean(dout w u)), since normalising loses the component of the
// gradient along x; dweight = sum over rows of dout u, here of these rows into `dweight`.
template <class Vec, class T>
void rms_norm_bwd_typed(const RmsNormRows& a, int64_t begin, int64_t end, float* dweight) {
  const T* weight = static_cast<const T*>(a.weight);
  each_vector<Vec>(a.width, [&](int64_t i, auto n) { store(Vec::zero(), dweight + i, n); });
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.width;
    const T* dout = static_cast<const T*>(a.dout) + r * a.width;
    T* dx = static_cast<T*>(a.out) + r * a.width;
    const Vec scale = Vec::all(a.inverse_rms[r]);
    Vec products = Vec::zero();
    each_vector<Vec>(a.width, [&](int64_t i, auto n) {
      const Vec share = load<Vec>(dout + i, n) * (load<Vec>(x + i, n) * scale);
      products = fma(share, load<Vec>(weight + i, n), products);
      store(load<Vec>(dweight + i, n) + share, dweight + i, n);
    });
    const Vec along = Vec::all(-sum(products) / static_cast<float>(a.width));
    each_vector<Vec>(a.width, [&](int64_t i, auto n) {
      const Vec unit = load<Vec>(x + i, n) * scale;
      store(fma(unit, along, load<Vec>(dout + i, n) * load<Vec>(weight + i, n)) * scale, dx + i, n);
    });
  }
}

template <class Vec>
void rms_norm_rows(const RmsNormRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? rms_norm_typed<Vec, float>(a, begin, end) : rms_norm_typed<Vec, bf16_t>(a, begin, end);
}

template <class Vec>
void rms_norm_bwd_rows(const RmsNormRows& a, int64_t begin, int64_t end, float* dweight) {
  a.dtype == DType::f32 ? rms_norm_bwd_typed<Vec, float>(a, begin, end, dweight)
                        : rms_norm_bwd_typed<Vec, bf16_t>(a, begin, end, dweight);
}

}  // namespace xt::cpu
