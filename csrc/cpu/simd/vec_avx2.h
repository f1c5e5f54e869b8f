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
  static constexpr int thin_tile_rows = 12;  // where one vector holds all columns
  static constexpr int block = 8;      // of transpose()
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  __m256 v;
  using Half = Vec;  // of the GEMM: for tiles with few columns

  static XT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static XT_INLINE Vec all(float f) { return {_mm256_set1_ps(f)}; }
  // In every lane the second of the two elements at p.
  static XT_INLINE Vec all_upper(const bf16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(both), _mm256_set1_epi32(-0x10000)))};
  }
  static XT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static XT_INLINE Vec load(const bf16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static XT_INLINE Vec load(const e4m3_t* p) { return load_fp8(p); }
  static XT_INLINE Vec load(const e5m2_t* p) { return load_fp8(p); }
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
    __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    asm("" : "+x"(both));  // else compilers load twice, an operand of each
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static XT_INLINE __m256i narrow_pair(Vec even, Vec odd) {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(even.v, odd.v, _CMP_UNORD_Q)) == 0, 1)) {
      const __m256i e = _mm256_castps_si256(even.v), o = _mm256_castps_si256(odd.v);
      const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xaa);
      const __m256i low = _mm256_blend_epi16(e, _mm256_slli_epi32(o, 16), 0xaa);
      // (low + 0x7fff + the lowest bit of high) / 2, whose highest bit is the carry into high
      const __m256i odd_high = _mm256_and_si256(high, _mm256_set1_epi16(1));
      const __m256i half = _mm256_avg_epu16(low, _mm256_or_si256(odd_high, _mm256_set1_epi16(0x7ffe)));
      return _mm256_add_epi16(high, _mm256_srli_epi16(half, 15));
    }
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
  // Base plus what the exponent of i, as a float's bits, is above that of Least, if it is. Least is a power of two; a
  // difference is less than 32 and shares no bits with Base's exponent.
  template <int32_t Least, int32_t Base>
  static XT_INLINE Ints exceed(Ints i) {
    const __m256i at_least = _mm256_max_epi32((__m256i)i, _mm256_set1_epi32(Least));
    const __m256i exponent = _mm256_and_si256(at_least, _mm256_set1_epi32(0x7f800000));
    return (Ints)_mm256_add_epi32(exponent, _mm256_set1_epi32(Base - Least));  // beyond the largest int for NaN
  }
  // Per lane Low times the signed lower half plus High times the upper half.
  template <int16_t Low, int16_t High>
  static XT_INLINE Ints add_halves(Ints i) {
    return (Ints)_mm256_madd_epi16((__m256i)i, _mm256_set1_epi32(High << 16 | Low));
  }
  // The signs of 4 * width elements, in the order of codes_of().
  static XT_INLINE __m256i signs(const float* p) {
    const auto at = [&](int i) { return _mm256_castps_si256(_mm256_loadu_ps(p + i * width)); };
    return _mm256_packs_epi16(_mm256_packs_epi32(at(0), at(1)), _mm256_packs_epi32(at(2), at(3)));
  }
  static XT_INLINE __m256i signs(const bf16_t* p) {
    const __m256i* x = reinterpret_cast<const __m256i*>(p);
    return _mm256_packs_epi16(_mm256_loadu_si256(x), _mm256_loadu_si256(x + 1));
  }
  // The second bytes of lanes in [0, 2^15), anything for other lanes, with signs. Of each 16 the first four are a's,
  // then come b, c and d where T is float; pairs a and b are in the order of memory, then come c and d.
  template <class T>
  static XT_INLINE Vec codes_of(Ints a, Ints b, Ints c, Ints d, __m256i signs) {
    const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    const __m256i bytes = _mm256_packus_epi16(_mm256_srli_epi16(ab, 8), _mm256_srli_epi16(cd, 8));
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m256i sorted = sizeof(T) == 4 ? bytes : _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    return {_mm256_castsi256_ps(_mm256_or_si256(sorted, _mm256_and_si256(signs, _mm256_set1_epi8(-0x80))))};
  }
  // The order of codes_of(): code i of a vector is that of element code_place<T>(i).
  template <class T>
  static constexpr int code_place(int i) {
    return sizeof(T) == 4 ? i % 16 / 4 * width + i / 16 * 4 + i % 4 : i % 16 / 8 * 2 * width + i / 16 * 8 + i % 8;
  }
  // Codes in the order of memory.
  template <class T>
  XT_INLINE Vec in_order() const {
    if constexpr (sizeof(T) == 4) {
      return {_mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))};
    } else {
      return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8))};
    }
  }
  // Its two times 16 bytes, `step` bytes apart.
  XT_INLINE void store_lanes(uint8_t* to, int64_t step) const {
    const __m256i i = _mm256_castps_si256(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + step), _mm256_extracti128_si256(i, 1));
  }
  // Bytes alternately of a and b, from the low (or high) half of each 16.
  static XT_INLINE Vec interleave_low(Vec a, Vec b) {
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi8(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
  }
  static XT_INLINE Vec interleave_high(Vec a, Vec b) {
    return {_mm256_castsi256_ps(_mm256_unpackhi_epi8(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
  }
  template <class F>
  static XT_INLINE Vec from_halves(__m128i i) {
    const __m256 wide = _mm256_cvtph_ps(i);
    return {Fp8<F>::half_unit == 1 ? wide : _mm256_mul_ps(wide, _mm256_set1_ps(Fp8<F>::half_unit))};
  }
  template <class F>
  static XT_INLINE Vec load_fp8(const F* p) {
    typedef int16_t Shorts __attribute__((vector_size(16)));
    const auto bytes = (Shorts)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return from_halves<F>((__m128i)fp8_halves<F>(bytes << 8));
  }
  // 4 * width numbers: in their order when T is float, else as two load_pair()s.
  template <class T, class F>
  static XT_INLINE void load_fp8(const F* p, Vec* to) {
    typedef int16_t Shorts __attribute__((vector_size(32)));
    const auto widen_both = [](Shorts bytes, Vec& low, Vec& high) {
      const auto i = fp8_halves<F>(bytes);
      low = from_halves<F>(_mm256_castsi256_si128((__m256i)i));
      high = from_halves<F>(_mm256_extracti128_si256((__m256i)i, 1));
    };
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < 4; i += 2) {
        const auto* at = reinterpret_cast<const __m128i*>(p + i * width);
        const auto bytes = (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128(at));
        widen_both(bytes << 8, to[i], to[i + 1]);
      }
    } else {
      const auto bytes = (Shorts)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      widen_both(bytes << 8, to[0], to[2]);
      widen_both(bytes, to[1], to[3]);
    }
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
