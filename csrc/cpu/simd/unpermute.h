#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/pair.h"

namespace xt::cpu {

// Asks for p[0:n] in the second-level cache; the first is too small for all the rows of a token.
template <class T>
XT_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// Where the row of a choice is: in one tensor, or in that of the rank its expert lives on. Null where it was dropped.
template <class T>
struct LocalRows {
  const UnpermuteRows& a;
  XT_INLINE const T* operator[](int64_t choice) const {
    const int64_t row = a.row_of[choice];
    return row < 0 ? nullptr : static_cast<const T*>(a.y) + row * a.hidden;
  }
};

template <class T>
struct PeerRows {
  const UnpermuteRows& a;
  const PeerTable& peers;
  XT_INLINE const T* operator[](int64_t choice) const {
    const int32_t rank = peers.dest[2 * choice];
    return rank < 0 ? nullptr : static_cast<const T*>(peers.base[rank]) + peers.dest[2 * choice + 1] * a.hidden;
  }
};

// Columns [h, h + N * width) of one token: the sum stays in registers while k runs. A token's rows lie anywhere in
// memory, which no hardware foresees, so each block asks for the same block of the next token if they are far.
template <bool Stream, class Vec, int N, class T, class Rows>
XT_INLINE void sum_columns(const UnpermuteRows& a, const Rows& rows, int64_t token, bool last, int64_t h) {
  constexpr int width = Pair<Vec>::width;
  const int64_t k_count = a.num_experts_per_tok, first = token * k_count, next = last ? first : first + k_count;
  Pair<Vec> acc[N];
  for (int j = 0; j < N; ++j) acc[j] = Pair<Vec>::zero();
  for (int64_t k = 0; k < k_count; ++k) {
    if (a.far) {
      if (const T* next_row = rows[next + k]) prefetch(next_row + h, N * width);
    }
    const T* row = rows[first + k];
    if (!row) continue;
    const Vec p = Vec::all(a.probs ? a.probs[first + k] : 1.0f);
    for (int j = 0; j < N; ++j) acc[j] = fma(p, Pair<Vec>::load(row + h + j * width), acc[j]);
  }
  T* out = static_cast<T*>(a.out) + token * a.hidden + h;
  for (int j = 0; j < N; ++j) acc[j].template store<Stream>(out + j * width);
}

template <class Vec, class T, class Rows>
XT_INLINE void sum_tail(const UnpermuteRows& a, const Rows& rows, int64_t token, int64_t h, int n) {
  Vec acc = Vec::zero();
  for (int64_t i = token * a.num_experts_per_tok; i < (token + 1) * a.num_experts_per_tok; ++i) {
    const T* row = rows[i];
    if (!row) continue;
    const Vec p = Vec::all(a.probs ? a.probs[i] : 1.0f);
    acc = fma(p, n < Vec::width ? Vec::load(row + h, n) : Vec::load(row + h), acc);
  }
  T* out = static_cast<T*>(a.out) + token * a.hidden + h;
  n < Vec::width ? acc.store(out, n) : acc.store(out);
}

template <bool Stream, class Vec, class T, class Rows>
XT_INLINE void unpermute_typed(const UnpermuteRows& a, const Rows& rows, int64_t begin, int64_t end) {
  constexpr int width = Pair<Vec>::width;
  for (int64_t token = begin; token < end; ++token) {
    const bool last = token + 1 == end;
    int64_t h = 0;
    for (; h + 4 * width <= a.hidden; h += 4 * width) sum_columns<Stream, Vec, 4, T>(a, rows, token, last, h);
    for (; h + width <= a.hidden; h += width) sum_columns<Stream, Vec, 1, T>(a, rows, token, last, h);
    for (; h < a.hidden; h += Vec::width) {
      const int64_t rest = a.hidden - h;
      sum_tail<Vec, T>(a, rows, token, h, rest < Vec::width ? static_cast<int>(rest) : Vec::width);
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

// As floats whatever they are: loads and stores change no bits.
template <bool Stream, class Vec>
XT_INLINE void copy_row(const void* x, void* out, int64_t bytes) {
  const float* from = static_cast<const float*>(x);
  float* to = static_cast<float*>(out);
  int64_t i = 0;
  for (; i + 4 * Vec::width <= bytes / 4; i += 4 * Vec::width) {
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * Pair<Vec>::width;
      Pair<Vec>::load(from + at).template store<Stream>(to + at);
    }
  }
  const int64_t done = 4 * i;
  if (done < bytes) {
    __builtin_memcpy(static_cast<char*>(out) + done, static_cast<const char*>(x) + done,
                     static_cast<size_t>(bytes - done));
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

template <class Vec, class T, class Rows>
void unpermute_rows(const UnpermuteRows& a, const Rows& rows, int64_t begin, int64_t end) {
  if (a.stream) {
    unpermute_typed<true, Vec, T>(a, rows, begin, end);
    Vec::fence();
  } else {
    unpermute_typed<false, Vec, T>(a, rows, begin, end);
  }
}

template <class Vec>
void unpermute_tokens(const UnpermuteRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? unpermute_rows<Vec, float>(a, LocalRows<float>{a}, begin, end)
                        : unpermute_rows<Vec, bf16_t>(a, LocalRows<bf16_t>{a}, begin, end);
}

template <class Vec>
void unpermute_peer_tokens(const UnpermuteRows& a, const PeerTable& peers, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? unpermute_rows<Vec, float>(a, PeerRows<float>{a, peers}, begin, end)
                        : unpermute_rows<Vec, bf16_t>(a, PeerRows<bf16_t>{a, peers}, begin, end);
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

template <class Vec>
void copy_row_bytes(bool stream, const void* x, void* out, int64_t bytes) {
  stream ? copy_row<true, Vec>(x, out, bytes) : copy_row<false, Vec>(x, out, bytes);
}

template <bool Stream, class Vec>
XT_INLINE float scale_and_dot_row(const ScaleAndDot& a) {
  if (a.dtype == DType::f32) {
    return scale_row<Stream, true, Vec, float>(a.p, static_cast<const float*>(a.x), static_cast<float*>(a.out), a.hidden,
                                               static_cast<const float*>(a.b), static_cast<const float*>(a.next_b));
  }
  return scale_row<Stream, true, Vec, bf16_t>(a.p, static_cast<const bf16_t*>(a.x), static_cast<bf16_t*>(a.out), a.hidden,
                                              static_cast<const bf16_t*>(a.b), static_cast<const bf16_t*>(a.next_b));
}

template <class Vec>
float scale_and_dot(const ScaleAndDot& a) {
  return a.stream ? scale_and_dot_row<true, Vec>(a) : scale_and_dot_row<false, Vec>(a);
}

template <class Vec>
void fence() {
  Vec::fence();
}

}  // namespace xt::cpu
