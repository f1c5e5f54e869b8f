// What happens to a slice of finished sums: bias, conversion to the output's dtype and layout, SwiGLU while it is hot.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/each_vector.h"
#include "cpu/simd/gemm_micro.h"
#include "cpu/simd/swiglu.h"

namespace xt::cpu {

// to[i] = from[i] + bias[i] (+ to[i])
template <class Vec, class T>
XT_INLINE void put_row(const float* from, const T* bias, bool accumulate, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) {
    Vec x = Vec::load(from + i);
    if (bias) x = x + Vec::load(bias + i);
    if (accumulate) x = Vec::load(to + i) + x;
    x.store(to + i);
  }
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  Vec x = Vec::load(from + i, rest);
  if (bias) x = x + Vec::load(bias + i, rest);
  if (accumulate) x = Vec::load(to + i, rest) + x;
  x.store(to + i, rest);
}

// The features of this tile along v, or of this slice along q: their first half, then perhaps the second.
template <class T>
XT_INLINE const T* bias_at(const GemmEpilogue& e, int64_t feature) {
  return e.bias ? static_cast<const T*>(e.bias) + feature : nullptr;
}

// Sums in the output itself: add the bias to rows [q, q + n).
template <class Vec>
void add_bias(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n) {
  for (int64_t half = 0; half < (p.epilogue.half ? 2 : 1); ++half) {
    const int64_t v = t.v0 + half * p.epilogue.half;
    for (int64_t i = q; i < q + n; ++i) {
      float* row = static_cast<float*>(p.out.data) + i * p.out.q_stride + v;
      put_row<Vec>(row, bias_at<float>(p.epilogue, v), false, row, t.v1 - t.v0);
    }
  }
}

// Output rows run along q: turn `block` columns of the sums at a time.
template <class Vec, class T>
void write_turned(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n, const float* sums, int64_t sums_row) {
  constexpr int64_t block = Vec::block, most = 96;  // GemmTileRunner::slice at most
  float turned[block * most];
  const T* bias = bias_at<T>(p.epilogue, q);
  T* out = static_cast<T*>(p.out.data) + t.v0 * p.out.v_stride + q;
  const int64_t num_v = t.v1 - t.v0;
  for (int64_t v = 0; v < num_v; v += block) {
    int64_t i = 0;
    for (; i + block <= n; i += block) {
      const float* from[block];
      for (int64_t j = 0; j < block; ++j) from[j] = sums + (i + j) * sums_row;
      Vec::template transpose<Single>(from, v, turned + i, most);
    }
    for (; i < n; ++i) {
      for (int64_t j = 0; j < block; ++j) turned[j * most + i] = sums[i * sums_row + v + j];
    }
    for (int64_t j = 0; j < block && v + j < num_v; ++j) {
      put_row<Vec>(turned + j * most, bias, p.out.accumulate, out + (v + j) * p.out.v_stride, n);
    }
  }
}

// Sums in scratch, `sums_half` from those of gate to those of up: write rows [q, q + n) of the output.
template <class Vec, class T>
void write_sums(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n, const float* sums, int64_t sums_row,
                int64_t sums_half) {
  if (p.out.v_stride != 1) return write_turned<Vec, T>(p, t, q, n, sums, sums_row);
  for (int64_t half = 0; half < (p.epilogue.half ? 2 : 1); ++half, sums += sums_half) {
    const int64_t v = t.v0 + half * p.epilogue.half;
    T* out = static_cast<T*>(p.out.data) + q * p.out.q_stride + v;
    for (int64_t i = 0; i < n; ++i) {
      put_row<Vec>(sums + i * sums_row, bias_at<T>(p.epilogue, v), p.out.accumulate, out + i * p.out.q_stride, t.v1 - t.v0);
    }
  }
}

// The same past the caches, for outputs without bias and SwiGLU.
template <class Vec, class T>
void stream_sums(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n, const float* sums, int64_t sums_row) {
  const int64_t num_v = t.v1 - t.v0, whole = num_v - num_v % Vec::width;
  for (int64_t i = 0; i < n; ++i, sums += sums_row) {
    T* out = static_cast<T*>(p.out.data) + (q + i) * p.out.q_stride + t.v0;
    for (int64_t v = 0; v < whole; v += Vec::width) Vec::load(sums + v).stream(out + v);
    if (whole < num_v) Vec::load(sums + whole).store(out + whole, static_cast<int>(num_v - whole));
  }
}

// act = swiglu(gate, up) for rows [q, q + n) of this tile, read back as they were rounded, so that the result is that
// of the op on its own.
template <class Vec, class T>
void activate_typed(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n) {
  const GemmEpilogue& e = p.epilogue;
  const bool turned = p.out.v_stride != 1;
  const int64_t token0 = turned ? t.v0 : q, token1 = turned ? t.v1 : q + n;
  const int64_t feature = turned ? q : t.v0, count = turned ? n : t.v1 - t.v0;
  const int64_t row = turned ? p.out.v_stride : p.out.q_stride;
  const Swiglu<Vec> f(e.alpha, e.limit, e.up_offset);
  for (int64_t token = token0; token < token1; ++token) {
    const T* gate = static_cast<const T*>(p.out.data) + token * row + feature;
    f.forward_row(gate, gate + e.half, static_cast<T*>(e.act) + token * e.act_row + feature, count);
  }
}

template <class Vec>
void activate(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n) {
  p.out.dtype == DType::f32 ? activate_typed<Vec, float>(p, t, q, n) : activate_typed<Vec, bf16_t>(p, t, q, n);
}

// Gradient of gate and up, activation and their product with the gradient: n columns of a row, whose `up` begins `half`
// elements behind `gate`. dgate holds the gradient of the activation.
template <class Vec, class T>
XT_INLINE void dswiglu_row(const Swiglu<Vec>& f, const T* gate, T* dgate, int64_t half, T* act, int64_t n, float weight,
                           float* dots) {
  constexpr int64_t panel = 2 * Vec::width;
  const Vec w = Vec::all(weight);
  for (int64_t i = 0; i < n; i += panel, gate += panel, dgate += panel, act += panel) {
    Vec dot = Vec::zero();
    each_vector<Vec>(n - i < panel ? n - i : panel, [&](int64_t j, auto count) {
      const Vec d = load<Vec>(dgate + j, count);
      Vec dg, du, a;
      f.backward(w * d, load<Vec>(gate + j, count), load<Vec>(gate + half + j, count), dg, du, a);
      store(dg, dgate + j, count);
      store(du, dgate + half + j, count);
      store(w * a, act + j, count);
      dot = fma(d, a, dot);
    });
    if (dots) *dots++ = sum(dot);
  }
}

// The output of rows [q, q + n) of this tile becomes the gradient of gate and up.
template <class Vec, class T>
void dswiglu_typed(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n) {
  const GemmEpilogue& e = p.epilogue;
  constexpr int64_t panel = 2 * Vec::width;
  const int64_t panels = (p.num_v + panel - 1) / panel, row = p.out.q_stride;
  const Swiglu<Vec> f(e.alpha, e.limit, e.up_offset);
  for (int64_t i = q; i < q + n; ++i) {
    const T* gate = static_cast<const T*>(e.gate_up) + i * row + t.v0;
    dswiglu_row<Vec>(f, gate, static_cast<T*>(p.out.data) + i * row + t.v0, row / 2,
                     static_cast<T*>(e.act) + i * e.act_row + t.v0, t.v1 - t.v0, e.weights ? e.weights[i] : 1.0f,
                     e.weights ? e.dots + i * panels + t.v0 / panel : nullptr);
  }
}

template <class Vec>
void dswiglu(const GemmProblem& p, const GemmTile& t, int64_t q, int64_t n) {
  p.out.dtype == DType::f32 ? dswiglu_typed<Vec, float>(p, t, q, n) : dswiglu_typed<Vec, bf16_t>(p, t, q, n);
}

}  // namespace xt::cpu
