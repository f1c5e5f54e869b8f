// The innermost loop: Q rows times N vectors of V, all sums in registers.
#pragma once
#include "cpu/simd/bf16.h"

namespace xt::cpu {

enum class Store { set, add, stream };  // overwrite, add to what is there, overwrite past the caches

// T: float for units of 32 bits, bf16_t where Q is widened on its way into a register.
template <class T>
using MicroFn = void (*)(int64_t units, const T* q, int64_t q_row, int64_t q_col, const float* v, int64_t v_col,
                         float* sums, int64_t sums_row, Store store);

// How a unit of Q and a vector of V enter the sums: one product of floats, or two of bfloat16 pairs.
struct Single {
  static constexpr int elements = 1;
  template <class Vec>
  static XT_INLINE Vec add(Vec x, Vec v, Vec sum) {
    return fma(x, v, sum);
  }
};
struct Paired {
  static constexpr int elements = 2;
  template <class Vec>
  static XT_INLINE Vec add(Vec x, Vec v, Vec sum) {
    return dot_pairs(x, v, sum);
  }
};

// The element at p in every lane. Of two neighbouring bfloat16 the later one is the upper half of 32 bits, that is a
// float once the lower half is cleared; only the first along k may have no neighbour in memory.
template <class Vec>
XT_INLINE Vec first_of(const float* p) {
  return Vec::all(*p);
}
template <class Vec>
XT_INLINE Vec first_of(const bf16_t* p) {
  return Vec::all(widen(*p));
}
template <class Vec>
XT_INLINE Vec later_of(const float* p) {
  return Vec::all(*p);
}
template <class Vec>
XT_INLINE Vec later_of(const bf16_t* p) {
  return Vec::all_upper(p - 1);
}

// sums[i, j] (+)= sum_k q[i * q_row + k * q_col] * v[k * v_col + j] for i < Q, j < N * width; q_col is 1 for bfloat16.
// The sums are named variables: compilers do not keep an array of this size in registers.
template <class Vec, class Unit, class T, int Q, int N>
void micro(int64_t units, const T* q, int64_t q_row, int64_t q_col, const float* v, int64_t v_col, float* sums,
           int64_t sums_row, Store store) {
// F(row, pointer to the row's group of three, place in the group): an address is then pointer + {0, 1, 2} * q_row
#define XT_EACH_ROW(F)                                                                                       \
  F(0, g0, 0) F(1, g0, 1) F(2, g0, 2) F(3, g1, 0) F(4, g1, 1) F(5, g1, 2) F(6, g2, 0) F(7, g2, 1) F(8, g2, 2) \
  F(9, g3, 0) F(10, g3, 1) F(11, g3, 2) F(12, g4, 0) F(13, g4, 1)
#define XT_DECLARE(i, g, m) [[maybe_unused]] Vec a##i = Vec::zero(), b##i = a##i;
#define XT_MULTIPLY(i, x_of, p)                           \
  if constexpr (i < Q) {                                  \
    const Vec x = x_of<Vec>(p);                           \
    a##i = Unit::add(x, v0, a##i);                        \
    if constexpr (N == 2) b##i = Unit::add(x, v1, b##i);  \
  }
#define XT_FIRST(i, g, m) XT_MULTIPLY(i, first_of, g + m * q_row)
#define XT_LATER(i, g, m) XT_MULTIPLY(i, later_of, g + m * q_row)
#define XT_STEP(MULTIPLY)                                                    \
  {                                                                          \
    const Vec v0 = Vec::load(v);                                             \
    [[maybe_unused]] const Vec v1 = N == 2 ? Vec::load(v + Vec::width) : v0; \
    XT_EACH_ROW(MULTIPLY)                                                    \
    v += v_col;                                                              \
    g0 += q_col;                                                             \
    if constexpr (Q > 3) g1 += q_col;                                        \
    if constexpr (Q > 6) g2 += q_col;                                        \
    if constexpr (Q > 9) g3 += q_col;                                        \
    if constexpr (Q > 12) g4 += q_col;                                       \
  }
#define XT_STORE(i, g, m)                                                            \
  if constexpr (i < Q) {                                                             \
    float* to = sums + i * sums_row;                                                 \
    if (store == Store::stream) {                                                    \
      a##i.stream(to);                                                               \
      if constexpr (N == 2) b##i.stream(to + Vec::width);                            \
    } else {                                                                         \
      if (store == Store::add) {                                                     \
        a##i = Vec::load(to) + a##i;                                                 \
        if constexpr (N == 2) b##i = Vec::load(to + Vec::width) + b##i;              \
      }                                                                              \
      a##i.store(to);                                                                \
      if constexpr (N == 2) b##i.store(to + Vec::width);                             \
    }                                                                                \
  }
  static_assert(Q <= 14 && (N == 1 || N == 2), "more rows need more names");
  XT_EACH_ROW(XT_DECLARE)
  const T* g0 = q;
  [[maybe_unused]] const T *g1 = q + 3 * q_row, *g2 = q + 6 * q_row, *g3 = q + 9 * q_row, *g4 = q + 12 * q_row;
  int64_t k = 0;
  if constexpr (sizeof(T) == 2) {
    q_col = 1;  // known when compiled
    XT_STEP(XT_FIRST)
    k = 1;
  }
#pragma GCC unroll 4
  for (; k < units; ++k) XT_STEP(XT_LATER)
  XT_EACH_ROW(XT_STORE)
#undef XT_EACH_ROW
#undef XT_DECLARE
#undef XT_MULTIPLY
#undef XT_FIRST
#undef XT_LATER
#undef XT_STEP
#undef XT_STORE
}

template <class Vec, class Unit, class T, int N, int Q = N == 1 ? Vec::thin_tile_rows : Vec::tile_rows>
MicroFn<T> micro_for(int64_t rows) {
  if constexpr (Q > 1) {
    if (rows < Q) return micro_for<Vec, Unit, T, N, Q - 1>(rows);
  }
  return micro<Vec, Unit, T, Q, N>;
}

}  // namespace xt::cpu
