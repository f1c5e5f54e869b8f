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
  static constexpr int tile_rows = 14, thin_tile_rows = 14;
  __m256 v;

  static XT_INLINE HalfVec zero() { return {_mm256_setzero_ps()}; }
  static XT_INLINE HalfVec all(float f) { return {_mm256_set1_ps(f)}; }
  static XT_INLINE HalfVec all_upper(const bf16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(both), _mm256_set1_epi32(-0x10000)))};
  }
  static XT_INLINE HalfVec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  XT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  XT_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
};

struct Vec {
  static constexpr int width = 16;
  static constexpr int tile_rows = 14;  // of the GEMM: 14 x 2 sums, 2 of V and a broadcast fit 32 registers
  static constexpr int thin_tile_rows = 14;  // where one vector holds all columns
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
  // In every lane the second of the two elements at p.
  static XT_INLINE Vec all_upper(const bf16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(both), _mm512_set1_epi32(-0x10000)))};
  }
  static XT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static XT_INLINE Vec load(const bf16_t* p) {
    return {widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static XT_INLINE Vec load(const e4m3_t* p) { return load_fp8(p); }
  static XT_INLINE Vec load(const e5m2_t* p) { return load_fp8(p); }
  // The first n elements, n < width; the rest is zero.
  static XT_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static XT_INLINE Vec load(const bf16_t* p, int n) { return {widen16(_mm256_maskz_loadu_epi16(first(n), p))}; }
  XT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  XT_INLINE void store(bf16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16()); }
  XT_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  XT_INLINE void store(bf16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow16()); }
  // 2 * width elements, the even ones in `even`: cheaper than load() where the order within them does not matter.
  static XT_INLINE void load_pair(const bf16_t* p, Vec& even, Vec& odd) {
    __m512i both = _mm512_loadu_si512(p);
    asm("" : "+v"(both));  // else compilers load twice, an operand of each
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static XT_INLINE __m512i narrow_pair(Vec even, Vec odd) {
#ifdef __AVX512BF16__
    // The instruction rounds as rounded() does, but takes subnormal numbers for zero.
    constexpr int subnormal = 0x20;
    const __mmask16 flushed = _mm512_fpclass_ps_mask(even.v, subnormal) | _mm512_fpclass_ps_mask(odd.v, subnormal);
    if (__builtin_expect(flushed == 0, 1)) {
      return interleave_halves((__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v));
    }
#else
    if (__builtin_expect(_mm512_cmp_ps_mask(even.v, odd.v, _CMP_UNORD_Q) == 0, 1)) {
      const __m512i e = _mm512_castps_si512(even.v), o = _mm512_castps_si512(odd.v);
      const __m512i high = _mm512_mask_mov_epi16(_mm512_srli_epi32(e, 16), 0xaaaaaaaau, o);
      const __m512i low = _mm512_mask_mov_epi16(e, 0xaaaaaaaau, _mm512_slli_epi32(o, 16));
      // (low + 0x7fff + the lowest bit of high) / 2, whose highest bit is the carry into high
      const __m512i half = _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(1), _mm512_set1_epi16(0x7ffe), 0xea);
      return _mm512_add_epi16(high, _mm512_srli_epi16(_mm512_avg_epu16(low, half), 15));
    }
#endif
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
  // Base plus what the exponent of i, as a float's bits, is above that of Least, if it is. Least is a power of two; a
  // difference is less than 32 and shares no bits with Base's exponent.
  template <int32_t Least, int32_t Base>
  static XT_INLINE Ints exceed(Ints i) {
    const __m512i above = _mm512_subs_epu16((__m512i)i, _mm512_set1_epi32(Least | 0xffff));
    return ((Ints)above & 31 << 23) | Base;
  }
  // Per lane Low times the signed lower half plus High times the upper half.
  template <int16_t Low, int16_t High>
  static XT_INLINE Ints add_halves(Ints i) {
    return (Ints)_mm512_madd_epi16((__m512i)i, _mm512_set1_epi32(High << 16 | Low));
  }
  // The signs of 4 * width elements, in the order of codes_of().
  static XT_INLINE __m512i signs(const float* p) {
    const auto at = [&](int i) { return _mm512_castps_si512(_mm512_loadu_ps(p + i * width)); };
    return _mm512_packs_epi16(_mm512_packs_epi32(at(0), at(1)), _mm512_packs_epi32(at(2), at(3)));
  }
  static XT_INLINE __m512i signs(const bf16_t* p) {
    return _mm512_packs_epi16(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 2 * width));
  }
  // The second bytes of lanes in [0, 2^15), anything for other lanes, with signs. Of each 16 the first four are a's,
  // then come b, c and d where T is float; pairs a and b are in the order of memory, then come c and d.
  template <class T>
  static XT_INLINE Vec codes_of(Ints a, Ints b, Ints c, Ints d, __m512i signs) {
    const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b), cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
    // (ab >> 8) | (cd & 0xff00)
    const __m512i mixed = _mm512_ternarylogic_epi32(_mm512_srli_epi16(ab, 8), cd, _mm512_set1_epi16(-0x100), 0xf8);
    const __m128i order = sizeof(T) == 4 ? _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
                                         : _mm_setr_epi8(0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15);
    const __m512i sorted = _mm512_shuffle_epi8(mixed, _mm512_broadcast_i32x4(order));
    const __m512i both = _mm512_ternarylogic_epi32(sorted, signs, _mm512_set1_epi8(-0x80), 0xf8);  // i | (signs & 0x80)
    return {_mm512_castsi512_ps(both)};
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
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      return {_mm512_permutexvar_ps(order, v)};
    } else {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      return {_mm512_castpd_ps(_mm512_permutexvar_pd(order, _mm512_castps_pd(v)))};
    }
  }
  // Its four times 16 bytes, `step` bytes apart.
  XT_INLINE void store_lanes(uint8_t* to, int64_t step) const {
    const __m512i i = _mm512_castps_si512(v);
    const auto at = [&](int64_t n) { return reinterpret_cast<__m128i*>(to + n * step); };
    _mm_storeu_si128(at(0), _mm512_castsi512_si128(i));
    _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(i, 1));
    _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(i, 2));
    _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(i, 3));
  }
  // Bytes alternately of a and b, from the low (or high) half of each 16.
  static XT_INLINE Vec interleave_low(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_unpacklo_epi8(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
  }
  static XT_INLINE Vec interleave_high(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_unpackhi_epi8(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
  }
  template <class F>
  static XT_INLINE Vec from_halves(__m256i i) {
    const __m512 wide = _mm512_cvtph_ps(i);
    return {Fp8<F>::half_unit == 1 ? wide : _mm512_mul_ps(wide, _mm512_set1_ps(Fp8<F>::half_unit))};
  }
  template <class F>
  static XT_INLINE Vec load_fp8(const F* p) {
    typedef int16_t Shorts __attribute__((vector_size(32)));
    const auto bytes = (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return from_halves<F>((__m256i)fp8_halves<F>(bytes << 8));
  }
  // 4 * width numbers: in their order when T is float, else as two load_pair()s.
  template <class T, class F>
  static XT_INLINE void load_fp8(const F* p, Vec* to) {
    typedef int16_t Shorts __attribute__((vector_size(64)));
    const auto widen_both = [](Shorts bytes, Vec& low, Vec& high) {
      const auto i = fp8_halves<F>(bytes);
      low = from_halves<F>(_mm512_castsi512_si256((__m512i)i));
      high = from_halves<F>(_mm512_extracti64x4_epi64((__m512i)i, 1));
    };
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < 4; i += 2) {
        const auto* at = reinterpret_cast<const __m256i*>(p + i * width);
        const auto bytes = (Shorts)_mm512_cvtepu8_epi16(_mm256_loadu_si256(at));
        widen_both(bytes << 8, to[i], to[i + 1]);
      }
    } else {
      const auto bytes = (Shorts)_mm512_loadu_si512(p);
      widen_both(bytes << 8, to[0], to[2]);
      widen_both(bytes, to[1], to[3]);
    }
  }
  static XT_INLINE int32_t largest(Ints i) { return _mm512_reduce_max_epi32((__m512i)i); }
#ifdef __AVX512BF16__
  // 16-bit lanes alternately from the lower and the upper half.
  static XT_INLINE __m512i interleave_halves(__m512i i) {
    const __m512i order = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006,
                                            0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d,
                                            0x1e000e, 0x1f000f);
    return _mm512_permutexvar_epi16(order, i);
  }
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
