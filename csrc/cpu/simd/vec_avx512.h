// Sixteen floats; AVX-512 F, BW, DQ, VL, and in its own namespace the same with BF16.
#pragma once
#include <immintrin.h>

#include "cpu/simd/bf16.h"
#include "cpu/simd/fp8.h"
#include "cpu/simd/transpose8.h"

#ifdef __AVX512BF16__
#define XT_AVX512 avx512bf16
#else
#define XT_AVX512 avx512
#endif

namespace xt::cpu::XT_AVX512 {

// Eight floats, for GEMM tiles with few columns: half the lanes, but two of them per cycle.
struct HalfVec {
  static constexpr int width = 8;
  static constexpr int tile_rows = 14;
  __m256 v;

  static XT_INLINE HalfVec zero() { return {_mm256_setzero_ps()}; }
  static XT_INLINE HalfVec all(float f) { return {_mm256_set1_ps(f)}; }
  static XT_INLINE HalfVec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  XT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  XT_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
};

struct Vec {
  static constexpr int width = 16;
  static constexpr int tile_rows = 14;  // of the GEMM: 14 x 2 sums, 2 of V and a broadcast fit 32 registers
  static constexpr int block = 8;      // of transpose()
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  __m512 v;
  using Half = HalfVec;

  static XT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static XT_INLINE __m512 widen16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  // Rounded to bf16 in the upper half of each element; the lower half holds anything.
  XT_INLINE __m512i rounded() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i sum = _mm512_mask_add_epi32(half, odd, bits, _mm512_set1_epi32(0x8000));
    return _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  }
  XT_INLINE __m256i narrow16() const { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(), 16)); }

  static XT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static XT_INLINE Vec all(float f) { return {_mm512_set1_ps(f)}; }
  static XT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static XT_INLINE Vec load(const bf16_t* p) {
    return {widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static XT_INLINE Vec load(const e4m3_t* p) { return load_fp8<Vec>(p); }
  static XT_INLINE Vec load(const e5m2_t* p) { return load_fp8<Vec>(p); }
  // The first n elements, n < width; the rest is zero.
  static XT_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static XT_INLINE Vec load(const bf16_t* p, int n) { return {widen16(_mm256_maskz_loadu_epi16(first(n), p))}; }
  XT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  XT_INLINE void store(bf16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16()); }
  XT_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  XT_INLINE void store(bf16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow16()); }
  // 2 * width elements, the even ones in `even`: cheaper than load() where the order within them does not matter.
  static XT_INLINE void load_pair(const bf16_t* p, Vec& even, Vec& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static XT_INLINE __m512i narrow_pair(Vec even, Vec odd) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(even.rounded(), 16), 0xaaaaaaaau, odd.rounded());
  }
  static XT_INLINE void store_pair(bf16_t* p, Vec even, Vec odd) { _mm512_storeu_si512(p, narrow_pair(even, odd)); }
  // stream: past the cache, to memory aligned to the vector; seen by other threads after fence().
  XT_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  XT_INLINE void stream(bf16_t* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow16()); }
  static XT_INLINE void stream_pair(bf16_t* p, Vec even, Vec odd) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(even, odd));
  }
  static XT_INLINE void fence() { _mm_sfence(); }
  static XT_INLINE Vec of(Ints bits) { return {(__m512)bits}; }
  static XT_INLINE Ints load_bytes(const uint8_t* p) {
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Lanes, in [0, 255], of four vectors in a row as bytes.
  static XT_INLINE Vec pack_bytes(Ints a, Ints b, Ints c, Ints d) {
    const __m512i ab = _mm512_packus_epi32((__m512i)a, (__m512i)b), cd = _mm512_packus_epi32((__m512i)c, (__m512i)d);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd)))};
  }
  static XT_INLINE int32_t largest(Ints i) { return _mm512_reduce_max_epi32((__m512i)i); }
#ifdef __AVX512BF16__
  // Pairs as they lie in memory.
  static XT_INLINE Vec load_units(const bf16_t* p) { return {_mm512_loadu_ps(p)}; }
  // Lane i: element i of `even` in the low half, of `odd` (or zero) in the high half.
  static XT_INLINE Vec load_pairs(const bf16_t* even) {
    return {_mm512_castsi512_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even))))};
  }
  static XT_INLINE Vec load_pairs(const bf16_t* even, const bf16_t* odd) {
    return {_mm512_or_ps(load(odd).v, load_pairs(even).v)};
  }
#endif
  // to[j * to_row + i] = unit j of rows[i] + at, for i, j < block
  template <class Unit, class T>
  static XT_INLINE void transpose(const T* const* rows, int64_t at, float* to, int64_t to_row) {
    transpose8<Unit>(rows, at, to, to_row);
  }
};

static XT_INLINE HalfVec operator+(HalfVec a, HalfVec b) { return {_mm256_add_ps(a.v, b.v)}; }
static XT_INLINE HalfVec fma(HalfVec a, HalfVec b, HalfVec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
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

#ifdef __AVX512BF16__
// Per lane two products of bfloat16, added to c.
static XT_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
static XT_INLINE HalfVec dot_pairs(HalfVec a, HalfVec b, HalfVec c) {
  return {_mm256_dpbf16_ps(c.v, (__m256bh)a.v, (__m256bh)b.v)};
}
#endif

}  // namespace xt::cpu::XT_AVX512
