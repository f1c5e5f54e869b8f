// Sixteen floats; AVX-512 F, BW, DQ, VL.
#pragma once
#include <immintrin.h>

#include "cpu/simd/bf16.h"
#include "cpu/simd/transpose8.h"

namespace xt::cpu::avx512 {

struct Vec {
  static constexpr int width = 16;
  static constexpr int tile_rows = 14;  // of the GEMM: 14 x 2 sums, 2 of V and a broadcast fit 32 registers
  static constexpr int block = 8;      // of transpose()
  __m512 v;

  static XT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static XT_INLINE __m512 widen16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  XT_INLINE __m256i narrow16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet_nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet_nan));
  }

  static XT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static XT_INLINE Vec all(float f) { return {_mm512_set1_ps(f)}; }
  static XT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static XT_INLINE Vec load(const bf16_t* p) {
    return {widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // The first n elements, n < width; the rest is zero.
  static XT_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static XT_INLINE Vec load(const bf16_t* p, int n) { return {widen16(_mm256_maskz_loadu_epi16(first(n), p))}; }
  XT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  XT_INLINE void store(bf16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16()); }
  XT_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  XT_INLINE void store(bf16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow16()); }
  // to[j * to_row + i] = from[i * from_row + j] for i, j < block
  template <class T>
  static XT_INLINE void transpose(const T* from, int64_t from_row, float* to, int64_t to_row) {
    transpose8(from, from_row, to, to_row);
  }
};

static XT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static XT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static XT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static XT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static XT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? x : y; false where a or b is NaN.
static XT_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
// 2^n for the integer n in the low bits of the float t = n + 1.5 * 2^23.
static XT_INLINE Vec exp2_of_biased(Vec t) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t.v), _mm512_set1_epi32(127)), 23))};
}
static XT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

}  // namespace xt::cpu::avx512
