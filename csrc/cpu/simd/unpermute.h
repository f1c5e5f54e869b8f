#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/inline.h"

namespace xt::cpu {

// Columns [h, h + N * width) of one token: the sum stays in registers while k runs.
template <class Vec, int N, class T>
XT_INLINE void sum_columns(const UnpermuteRows& a, int64_t token, int64_t h) {
  const int64_t k_count = a.num_experts_per_tok;
  const int32_t* row_of = a.row_of + token * k_count;
  const float* probs = a.probs ? a.probs + token * k_count : nullptr;
  Vec acc[N];
  for (int j = 0; j < N; ++j) acc[j] = Vec::zero();
  for (int64_t k = 0; k < k_count; ++k) {
    if (row_of[k] < 0) continue;
    const T* y = static_cast<const T*>(a.y) + row_of[k] * a.hidden + h;
    const Vec p = Vec::all(probs ? probs[k] : 1.0f);
    for (int j = 0; j < N; ++j) acc[j] = fma(p, Vec::load(y + j * Vec::width), acc[j]);
  }
  T* out = static_cast<T*>(a.out) + token * a.hidden + h;
  for (int j = 0; j < N; ++j) acc[j].store(out + j * Vec::width);
}

template <class Vec, class T>
XT_INLINE void sum_tail(const UnpermuteRows& a, int64_t token, int64_t h, int n) {
  const int64_t k_count = a.num_experts_per_tok;
  Vec acc = Vec::zero();
  for (int64_t k = 0; k < k_count; ++k) {
    const int32_t row = a.row_of[token * k_count + k];
    if (row < 0) continue;
    const T* y = static_cast<const T*>(a.y) + row * a.hidden + h;
    acc = fma(Vec::all(a.probs ? a.probs[token * k_count + k] : 1.0f), Vec::load(y, n), acc);
  }
  acc.store(static_cast<T*>(a.out) + token * a.hidden + h, n);
}

template <class Vec, class T>
void unpermute_typed(const UnpermuteRows& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    int64_t h = 0;
    for (; h + 4 * Vec::width <= a.hidden; h += 4 * Vec::width) sum_columns<Vec, 4, T>(a, token, h);
    for (; h + Vec::width <= a.hidden; h += Vec::width) sum_columns<Vec, 1, T>(a, token, h);
    if (h < a.hidden) sum_tail<Vec, T>(a, token, h, static_cast<int>(a.hidden - h));
  }
}

template <class Vec, class T>
XT_INLINE float dot(const T* a, const T* b, int64_t n) {
  Vec s0 = Vec::zero(), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * Vec::width <= n; i += 4 * Vec::width) {
    s0 = fma(Vec::load(a + i), Vec::load(b + i), s0);
    s1 = fma(Vec::load(a + i + Vec::width), Vec::load(b + i + Vec::width), s1);
    s2 = fma(Vec::load(a + i + 2 * Vec::width), Vec::load(b + i + 2 * Vec::width), s2);
    s3 = fma(Vec::load(a + i + 3 * Vec::width), Vec::load(b + i + 3 * Vec::width), s3);
  }
  for (; i + Vec::width <= n; i += Vec::width) s0 = fma(Vec::load(a + i), Vec::load(b + i), s0);
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    s1 = fma(Vec::load(a + i, rest), Vec::load(b + i, rest), s1);
  }
  return sum((s0 + s1) + (s2 + s3));
}

template <class Vec, class T>
XT_INLINE void scale_row(float p, const T* x, T* out, int64_t n) {
  const Vec factor = Vec::all(p);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) (factor * Vec::load(x + i)).store(out + i);
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    (factor * Vec::load(x + i, rest)).store(out + i, rest);
  }
}

template <class Vec, class T>
void unpermute_bwd_typed(const UnpermuteRows& a, int64_t begin, int64_t end) {
  const int64_t k_count = a.num_experts_per_tok;
  for (int64_t token = begin; token < end; ++token) {
    const T* dout = static_cast<const T*>(a.dout) + token * a.hidden;
    for (int64_t i = token * k_count; i < (token + 1) * k_count; ++i) {
      const int64_t row = a.row_of[i];
      if (a.dprobs) {
        a.dprobs[i] = row < 0 ? 0.0f : dot<Vec>(dout, static_cast<const T*>(a.y) + row * a.hidden, a.hidden);
      }
      if (row < 0) continue;
      T* dy = static_cast<T*>(a.dy) + row * a.hidden;
      if (a.probs) {
        scale_row<Vec>(a.probs[i], dout, dy, a.hidden);
      } else {
        __builtin_memcpy(dy, dout, static_cast<size_t>(a.hidden) * sizeof(T));
      }
    }
  }
}

template <class Vec>
void unpermute_tokens(const UnpermuteRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? unpermute_typed<Vec, float>(a, begin, end) : unpermute_typed<Vec, bf16_t>(a, begin, end);
}

template <class Vec>
void unpermute_bwd_tokens(const UnpermuteRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? unpermute_bwd_typed<Vec, float>(a, begin, end)
                        : unpermute_bwd_typed<Vec, bf16_t>(a, begin, end);
}

}  // namespace xt::cpu
