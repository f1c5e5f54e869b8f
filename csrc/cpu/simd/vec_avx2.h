// Eight floats; AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include "cpu/simd/bf16.h"
#include "cpu/simd/fp8.h"
#include "cpu/simd/transpose8.h"

namespace xt::cpu::avx2 {

struct Vec {
  static constexpr int width = 8;
  static constexpr int tile_rows = 6;  // of the GEMM: 6 x 2 sums, 2 of V and a broadcast fit 16 registers
  static constexpr int block = 8;      // of transpose()
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  __m256 v;
  using Half = Vec;  // of the GEMM: for tiles with few columns

  static XT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static XT_INLINE Vec all(float f) { return {_mm256_set1_ps(f)}; }
  static XT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static XT_INLINE Vec load(const bf16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static XT_INLINE Vec load(const e4m3_t* p) { return load_fp8<Vec>(p); }
  static XT_INLINE Vec load(const e5m2_t* p) { return load_fp8<Vec>(p); }
  // The first n elements, n < width; the rest is zero.
  template <class T>
  static XT_INLINE Vec load(const T* p, int n) {
    T t[width] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  XT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  // Rounded to bf16 in the upper half of each element; the lower half holds anything.
  XT_INLINE __m256i rounded() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(sum, quiet_nan, is_nan);
  }
  XT_INLINE __m128i narrow8() const {
    const __m256i high = _mm256_srli_epi32(rounded(), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
  }
  XT_INLINE void store(bf16_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow8()); }
  template <class T>
  XT_INLINE void store(T* p, int n) const {
    T t[width];
    store(t);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }
  // 2 * width elements, the even ones in `even`: cheaper than load() where the order within them does not matter.
  static XT_INLINE void load_pair(const bf16_t* p, Vec& even, Vec& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static XT_INLINE __m256i narrow_pair(Vec even, Vec odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even.rounded(), 16), odd.rounded(), 0xaa);
  }
  static XT_INLINE void store_pair(bf16_t* p, Vec even, Vec odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(even, odd));
  }
  // stream: past the cache, to memory aligned to the vector; seen by other threads after fence().
  XT_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  XT_INLINE void stream(bf16_t* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow8()); }
  static XT_INLINE void stream_pair(bf16_t* p, Vec even, Vec odd) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(even, odd));
  }
  static XT_INLINE void fence() { _mm_sfence(); }
  static XT_INLINE Vec of(Ints bits) { return {(__m256)bits}; }
  static XT_INLINE Ints load_bytes(const uint8_t* p) {
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  // Lanes, in [0, 255], of four vectors in a row as bytes.
  static XT_INLINE Vec pack_bytes(Ints a, Ints b, Ints c, Ints d) {
    const __m256i ab = _mm256_packus_epi32((__m256i)a, (__m256i)b), cd = _mm256_packus_epi32((__m256i)c, (__m256i)d);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return {_mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order))};
  }
  static XT_INLINE int32_t largest(Ints i) {
    const __m256i a = (__m256i)i;
    const __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i pair = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_max_epi32(pair, _mm_shuffle_epi32(pair, 1)));
  }
  // to[j * to_row + i] = unit j of rows[i] + at, for i, j < block
  template <class Unit, class T>
  static XT_INLINE void transpose(const T* const* rows, int64_t at, float* to, int64_t to_row) {
    transpose8<Unit>(rows, at, to, to_row);
  }
};

static XT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static XT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static XT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static XT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static XT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? x : y; false where a or b is NaN.
static XT_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
// 2^n for the integer n in the low bits of the float t = n + 1.5 * 2^23.
static XT_INLINE Vec exp2_of_biased(Vec t) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t.v), _mm256_set1_epi32(127)), 23))};
}
static XT_INLINE float sum(Vec a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

}  // namespace xt::cpu::avx2
