// The innermost loop: Q rows times N vectors of V, all sums in registers.
#pragma once
#include "cpu/simd/inline.h"

namespace xt::cpu {

enum class Store { set, add, stream };  // overwrite, add to what is there, overwrite past the caches

using MicroFn = void (*)(int64_t units, const float* q, int64_t q_row, int64_t q_col, const float* v, int64_t v_col,
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

// sums[i, j] (+)= sum_k q[i * q_row + k * q_col] * v[k * v_col + j] for i < Q, j < N * width.
// The sums are named variables: compilers do not keep an array of this size in registers.
template <class Vec, class Unit, int Q, int N>
void micro(int64_t units, const float* q, int64_t q_row, int64_t q_col, const float* v, int64_t v_col, float* sums,
           int64_t sums_row, Store store) {
// F(row, pointer to the row's group of three, place in the group): an address is then pointer + {0, 1, 2} * q_row
#define XT_EACH_ROW(F)                                                                                       \
  F(0, g0, 0) F(1, g0, 1) F(2, g0, 2) F(3, g1, 0) F(4, g1, 1) F(5, g1, 2) F(6, g2, 0) F(7, g2, 1) F(8, g2, 2) \
  F(9, g3, 0) F(10, g3, 1) F(11, g3, 2) F(12, g4, 0) F(13, g4, 1)
#define XT_DECLARE(i, g, m) [[maybe_unused]] Vec a##i = Vec::zero(), b##i = a##i;
#define XT_MULTIPLY(i, g, m)                              \
  if constexpr (i < Q) {                                  \
    const Vec x = Vec::all(g[m * q_row]);                 \
    a##i = Unit::add(x, v0, a##i);                        \
    if constexpr (N == 2) b##i = Unit::add(x, v1, b##i);  \
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
  const float* g0 = q;
  [[maybe_unused]] const float *g1 = q + 3 * q_row, *g2 = q + 6 * q_row, *g3 = q + 9 * q_row, *g4 = q + 12 * q_row;
#pragma GCC unroll 4
  for (int64_t k = 0; k < units; ++k) {
    const Vec v0 = Vec::load(v);
    [[maybe_unused]] const Vec v1 = N == 2 ? Vec::load(v + Vec::width) : v0;
    XT_EACH_ROW(XT_MULTIPLY)
    v += v_col;
    g0 += q_col;
    if constexpr (Q > 3) g1 += q_col;
    if constexpr (Q > 6) g2 += q_col;
    if constexpr (Q > 9) g3 += q_col;
    if constexpr (Q > 12) g4 += q_col;
  }
  XT_EACH_ROW(XT_STORE)
#undef XT_EACH_ROW
#undef XT_DECLARE
#undef XT_MULTIPLY
#undef XT_STORE
}

template <class Vec, class Unit, int N, int Q = Vec::tile_rows>
MicroFn micro_for(int64_t rows) {
  if constexpr (Q > 1) {
    if (rows < Q) return micro_for<Vec, Unit, N, Q - 1>(rows);
  }
  return micro<Vec, Unit, Q, N>;
}

}  // namespace xt::cpu
