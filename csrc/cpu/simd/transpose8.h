// 8 x 8 transpose in AVX registers, widening bfloat16 on the way.
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

// to[j * to_row + i] = from[i * from_row + j]
template <class T>
static XT_INLINE void transpose8(const T* from, int64_t from_row, float* to, int64_t to_row) {
  const __m256 r0 = load8(from), r1 = load8(from + from_row), r2 = load8(from + 2 * from_row),
               r3 = load8(from + 3 * from_row), r4 = load8(from + 4 * from_row), r5 = load8(from + 5 * from_row),
               r6 = load8(from + 6 * from_row), r7 = load8(from + 7 * from_row);
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
