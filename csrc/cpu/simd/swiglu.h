#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/exp.h"

namespace xt::cpu {

template <class Vec>
struct Swiglu {
  Vec alpha, limit, up_offset;
  bool limited;

  XT_INLINE Swiglu(float alpha, float limit, float up_offset)
      : alpha(Vec::all(alpha)),
        limit(Vec::all(limit)),
        up_offset(Vec::all(up_offset)),
        limited(limit < __builtin_inff()) {}
  XT_INLINE explicit Swiglu(const SwigluRows& a) : Swiglu(a.alpha, a.limit, a.up_offset) {}

  XT_INLINE Vec sigmoid(Vec z) const { return Vec::all(1.0f) / (Vec::all(1.0f) + exp(Vec::zero() - z)); }
  XT_INLINE Vec cut_gate(Vec g) const { return limited ? select_gt(g, limit, limit, g) : g; }
  XT_INLINE Vec cut_up(Vec u) const {
    if (!limited) return u;
    const Vec low = Vec::zero() - limit;
    return select_gt(u, limit, limit, select_gt(low, u, low, u));
  }

  XT_INLINE Vec forward(Vec g, Vec u) const {
    g = cut_gate(g);
    return g * sigmoid(alpha * g) * (cut_up(u) + up_offset);
  }

  template <class T>
  XT_INLINE void forward_row(const T* gate, const T* up, T* out, int64_t n) const {
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) forward(Vec::load(gate + i), Vec::load(up + i)).store(out + i);
    const int rest = static_cast<int>(n - i);
    if (rest) forward(Vec::load(gate + i, rest), Vec::load(up + i, rest)).store(out + i, rest);
  }

  // d(out)/d(gate) = s + alpha g s (1 - s) with s = sigmoid(alpha g), times (up + offset); d(out)/d(up) = g s.
  XT_INLINE void backward(Vec dout, Vec g_raw, Vec u_raw, Vec& dg, Vec& du) const {
    Vec out;
    backward(dout, g_raw, u_raw, dg, du, out);
  }

  // The same, and what forward gives.
  XT_INLINE void backward(Vec dout, Vec g_raw, Vec u_raw, Vec& dg, Vec& du, Vec& out) const {
    const Vec g = cut_gate(g_raw), u = cut_up(u_raw), zero = Vec::zero();
    const Vec s = sigmoid(alpha * g);
    const Vec gs = g * s;
    out = gs * (u + up_offset);
    dg = dout * (u + up_offset) * fma(alpha * gs, Vec::all(1.0f) - s, s);
    du = dout * gs;
    if (!limited) return;
    dg = select_gt(g_raw, limit, zero, dg);
    du = select_gt(u_raw, limit, zero, select_gt(zero - limit, u_raw, zero, du));
  }
};

template <class Vec, class T>
void swiglu_typed(const SwigluRows& a, int64_t begin, int64_t end) {
  const Swiglu<Vec> f(a);
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(a.x) + r * a.row;
    f.forward_row(gate, gate + a.up, static_cast<T*>(a.out) + r * a.width, a.width);
  }
}

template <class Vec, class T>
void swiglu_bwd_typed(const SwigluRows& a, int64_t begin, int64_t end) {
  const Swiglu<Vec> f(a);
  const int64_t width = a.width, whole = width - width % Vec::width;
  const int rest = static_cast<int>(width - whole);
  for (int64_t r = begin; r < end; ++r) {
    const T* dout = static_cast<const T*>(a.dout) + r * width;
    const T* gate = static_cast<const T*>(a.x) + r * 2 * width;
    T* dgate = static_cast<T*>(a.out) + r * 2 * width;
    Vec dg, du;
    for (int64_t i = 0; i < whole; i += Vec::width) {
      f.backward(Vec::load(dout + i), Vec::load(gate + i), Vec::load(gate + width + i), dg, du);
      dg.store(dgate + i);
      du.store(dgate + width + i);
    }
    if (rest) {
      f.backward(Vec::load(dout + whole, rest), Vec::load(gate + whole, rest), Vec::load(gate + width + whole, rest),
                 dg, du);
      dg.store(dgate + whole, rest);
      du.store(dgate + width + whole, rest);
    }
  }
}

template <class Vec>
void swiglu_rows(const SwigluRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? swiglu_typed<Vec, float>(a, begin, end) : swiglu_typed<Vec, bf16_t>(a, begin, end);
}

template <class Vec>
void swiglu_bwd_rows(const SwigluRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? swiglu_bwd_typed<Vec, float>(a, begin, end) : swiglu_bwd_typed<Vec, bf16_t>(a, begin, end);
}

}  // namespace xt::cpu
