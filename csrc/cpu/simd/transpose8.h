// 8 x 8 transpose of 32-bit units in AVX registers; see gemm_pack.h for units.
#pragma once
#include <immintrin.h>

#include "cpu/simd/inline.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

static XT_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
static XT_INLINE __m256 load8(const bf16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

template <class Unit, class T>
static XT_INLINE __m256 load8_units(const T* p) {
  if constexpr (Unit::elements == 2) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else {
    return load8(p);
  }
}

// to[j * to_row + i] = unit j of rows[i] + at, for i, j < 8
template <class Unit, class T>
static XT_INLINE void transpose8(const T* const* rows, int64_t at, float* to, int64_t to_row) {
  const __m256 r0 = load8_units<Unit>(rows[0] + at), r1 = load8_units<Unit>(rows[1] + at),
               r2 = load8_units<Unit>(rows[2] + at), r3 = load8_units<Unit>(rows[3] + at),
               r4 = load8_units<Unit>(rows[4] + at), r5 = load8_units<Unit>(rows[5] + at),
               r6 = load8_units<Unit>(rows[6] + at), r7 = load8_units<Unit>(rows[7] + at);
  const __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1), a2 = _mm256_unpacklo_ps(r2, r3),
               a3 = _mm256_unpackhi_ps(r2, r3), a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5),
               a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee),
               b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee),
               b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee),
               b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(b0, b4, 0x20));
  _mm256_storeu_ps(to + to_row, _mm256_permute2f128_ps(b1, b5, 0x20));
  _mm256_storeu_ps(to + 2 * to_row, _mm256_permute2f128_ps(b2, b6, 0x20));
  _mm256_storeu_ps(to + 3 * to_row, _mm256_permute2f128_ps(b3, b7, 0x20));
  _mm256_storeu_ps(to + 4 * to_row, _mm256_permute2f128_ps(b0, b4, 0x31));
  _mm256_storeu_ps(to + 5 * to_row, _mm256_permute2f128_ps(b1, b5, 0x31));
  _mm256_storeu_ps(to + 6 * to_row, _mm256_permute2f128_ps(b2, b6, 0x31));
  _mm256_storeu_ps(to + 7 * to_row, _mm256_permute2f128_ps(b3, b7, 0x31));
}

}  // namespace xt::cpu
