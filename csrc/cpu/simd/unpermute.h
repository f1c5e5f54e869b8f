#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/pair.h"

namespace xt::cpu {

// Asks for p[0:n] in the second-level cache; the first is too small for all the rows of a token.
template <class T>
XT_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// Columns [h, h + N * width) of one token: the sum stays in registers while k runs. A token's rows lie anywhere in
// memory, which no hardware foresees, so each block asks for the same block of the next token.
template <bool Stream, class Vec, int N, class T>
XT_INLINE void sum_columns(const UnpermuteRows& a, int64_t token, bool last, int64_t h) {
  constexpr int width = Pair<Vec>::width;
  const int64_t k_count = a.num_experts_per_tok;
  const int32_t* row_of = a.row_of + token * k_count;
  const int32_t* next_row_of = last ? row_of : row_of + k_count;
  const float* probs = a.probs ? a.probs + token * k_count : nullptr;
  const T* y = static_cast<const T*>(a.y) + h;
  Pair<Vec> acc[N];
  for (int j = 0; j < N; ++j) acc[j] = Pair<Vec>::zero();
  for (int64_t k = 0; k < k_count; ++k) {
    if (next_row_of[k] >= 0) prefetch(y + next_row_of[k] * a.hidden, N * width);
    if (row_of[k] < 0) continue;
    const T* row = y + row_of[k] * a.hidden;
    const Vec p = Vec::all(probs ? probs[k] : 1.0f);
    for (int j = 0; j < N; ++j) acc[j] = fma(p, Pair<Vec>::load(row + j * width), acc[j]);
  }
  T* out = static_cast<T*>(a.out) + token * a.hidden + h;
  for (int j = 0; j < N; ++j) acc[j].template store<Stream>(out + j * width);
}

template <class Vec, class T>
XT_INLINE void sum_tail(const UnpermuteRows& a, int64_t token, int64_t h, int n) {
  const int64_t k_count = a.num_experts_per_tok;
  Vec acc = Vec::zero();
  for (int64_t k = 0; k < k_count; ++k) {
    const int32_t row = a.row_of[token * k_count + k];
    if (row < 0) continue;
    const T* y = static_cast<const T*>(a.y) + row * a.hidden + h;
    const Vec p = Vec::all(a.probs ? a.probs[token * k_count + k] : 1.0f);
    acc = fma(p, n < Vec::width ? Vec::load(y, n) : Vec::load(y), acc);
  }
  T* out = static_cast<T*>(a.out) + token * a.hidden + h;
  n < Vec::width ? acc.store(out, n) : acc.store(out);
}

template <bool Stream, class Vec, class T>
void unpermute_typed(const UnpermuteRows& a, int64_t begin, int64_t end) {
  constexpr int width = Pair<Vec>::width;
  for (int64_t token = begin; token < end; ++token) {
    const bool last = token + 1 == end;
    int64_t h = 0;
    for (; h + 4 * width <= a.hidden; h += 4 * width) sum_columns<Stream, Vec, 4, T>(a, token, last, h);
    for (; h + width <= a.hidden; h += width) sum_columns<Stream, Vec, 1, T>(a, token, last, h);
    for (; h < a.hidden; h += Vec::width) {
      const int64_t rest = a.hidden - h;
      sum_tail<Vec, T>(a, token, h, rest < Vec::width ? static_cast<int>(rest) : Vec::width);
    }
  }
}

// out = p * x; with `b` also returns <x, b>, and asks for b's successor on the way.
template <bool Stream, bool Dot, class Vec, class T>
XT_INLINE float scale_row(float p, const T* x, T* out, int64_t n, const T* b, const T* next_b) {
  constexpr int width = Pair<Vec>::width;
  const Vec factor = Vec::all(p);
  Pair<Vec> sums[2] = {Pair<Vec>::zero(), Pair<Vec>::zero()};
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    if (Dot) prefetch(next_b + i, 2 * width);
    for (int j = 0; j < 2; ++j) {
      const Pair<Vec> v = Pair<Vec>::load(x + i + j * width);
      if (Dot) sums[j] = fma(v, Pair<Vec>::load(b + i + j * width), sums[j]);
      (factor * v).template store<Stream>(out + i + j * width);
    }
  }
  for (; i < n; i += Vec::width) {
    const int rest = n - i < Vec::width ? static_cast<int>(n - i) : Vec::width;
    const bool whole = rest == Vec::width;
    const Vec v = whole ? Vec::load(x + i) : Vec::load(x + i, rest);
    Vec& s = whole ? sums[0].a : sums[0].b;
    if (Dot) s = fma(v, whole ? Vec::load(b + i) : Vec::load(b + i, rest), s);
    whole ? (factor * v).store(out + i) : (factor * v).store(out + i, rest);
  }
  return Dot ? sum((sums[0].a + sums[0].b) + (sums[1].a + sums[1].b)) : 0.0f;
}

template <bool Stream, class Vec>
XT_INLINE void copy_row(const void* x, void* out, int64_t bytes) {
  if constexpr (Stream) {
    const float* from = static_cast<const float*>(x);
    float* to = static_cast<float*>(out);
    for (int64_t i = 0; i < bytes / 4; i += Vec::width) Vec::load(from + i).stream(to + i);
  } else {
    __builtin_memcpy(out, x, static_cast<size_t>(bytes));
  }
}

template <bool Stream, class Vec, class T>
void unpermute_bwd_typed(const UnpermuteRows& a, int64_t begin, int64_t end) {
  const int64_t k_count = a.num_experts_per_tok;
  for (int64_t token = begin; token < end; ++token) {
    const T* dout = static_cast<const T*>(a.dout) + token * a.hidden;
    for (int64_t i = token * k_count; i < (token + 1) * k_count; ++i) {
      const int64_t row = a.row_of[i];
      if (row < 0) {
        if (a.dprobs) a.dprobs[i] = 0.0f;
        continue;
      }
      const float p = a.probs ? a.probs[i] : 1.0f;
      T* dy = static_cast<T*>(a.dy) + row * a.hidden;
      if (a.dprobs) {
        const int64_t next = i + 1 < end * k_count && a.row_of[i + 1] >= 0 ? a.row_of[i + 1] : row;
        const T* y = static_cast<const T*>(a.y);
        a.dprobs[i] = scale_row<Stream, true, Vec, T>(p, dout, dy, a.hidden, y + row * a.hidden, y + next * a.hidden);
      } else if (a.probs) {
        scale_row<Stream, false, Vec, T>(p, dout, dy, a.hidden, nullptr, nullptr);
      } else {
        copy_row<Stream, Vec>(dout, dy, a.hidden * static_cast<int64_t>(sizeof(T)));
      }
    }
  }
}

template <class Vec>
void unpermute_tokens(const UnpermuteRows& a, int64_t begin, int64_t end) {
  const bool f32 = a.dtype == DType::f32;
  if (a.stream) {
    f32 ? unpermute_typed<true, Vec, float>(a, begin, end) : unpermute_typed<true, Vec, bf16_t>(a, begin, end);
    Vec::fence();
  } else {
    f32 ? unpermute_typed<false, Vec, float>(a, begin, end) : unpermute_typed<false, Vec, bf16_t>(a, begin, end);
  }
}

template <class Vec>
void unpermute_bwd_tokens(const UnpermuteRows& a, int64_t begin, int64_t end) {
  const bool f32 = a.dtype == DType::f32;
  if (a.stream) {
    f32 ? unpermute_bwd_typed<true, Vec, float>(a, begin, end) : unpermute_bwd_typed<true, Vec, bf16_t>(a, begin, end);
    Vec::fence();
  } else {
    f32 ? unpermute_bwd_typed<false, Vec, float>(a, begin, end)
        : unpermute_bwd_typed<false, Vec, bf16_t>(a, begin, end);
  }
}

}  // namespace xt::cpu
