// Four floats in the compiler's own vector type: SSE2 on x86-64, NEON on AArch64. Multiply-adds are fused on AArch64,
// where every processor does that; elsewhere they are not.
#pragma once
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "cpu/simd/bf16.h"
#include "cpu/simd/fp8.h"
#include "cpu/simd/transpose_bytes.h"

namespace xt::cpu::portable {

struct Vec {
  static constexpr int width = 4;
#ifdef __aarch64__
  static constexpr int tile_rows = 8;  // of the GEMM: 8 x 2 sums, 2 of V and a broadcast fit 32 registers
#else
  static constexpr int tile_rows = 6;  // of the GEMM: 6 x 2 sums, 2 of V and a broadcast fit 16 registers
#endif
  static constexpr int thin_tile_rows = 12;  // where one vector holds all columns
  static constexpr int block = 4;            // of transpose()
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  static constexpr int32_t upper_half = static_cast<int32_t>(0xffff0000u);
  Floats v;
  using Half = Vec;  // of the GEMM: for tiles with few columns

  // Rounded to bf16 in the upper half of each element; the lower half holds anything.
  XT_INLINE Bits rounded() const {
    const Bits bits = (Bits)v, sum = bits + 0x7fffu + ((bits >> 16) & 1u), is_nan = (Bits)(v != v);
    return (is_nan & (bits | 0x400000u)) | (~is_nan & sum);
  }

  static XT_INLINE Vec zero() { return {Floats{}}; }
  static XT_INLINE Vec all(float f) { return {Floats{f, f, f, f}}; }
  // In every lane the second of the two elements at p.
  static XT_INLINE Vec all_upper(const bf16_t* p) {
    int32_t both;
    __builtin_memcpy(&both, p, 4);
    return {(Floats)(Ints{both, both, both, both} & upper_half)};
  }
  static XT_INLINE Vec load(const float* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, 16);
    return r;
  }
  static XT_INLINE Vec load(const bf16_t* p) {
    Halves h;
    __builtin_memcpy(&h, p, 8);
    return {(Floats)(__builtin_convertvector(h, Bits) << 16)};
  }
  static XT_INLINE Vec load(const e4m3_t* p) { return fp8_values<e4m3_t, Vec>(load_bytes(&p->bits)); }
  static XT_INLINE Vec load(const e5m2_t* p) { return fp8_values<e5m2_t, Vec>(load_bytes(&p->bits)); }
  // The first n elements, n < width; the rest is zero.
  template <class T>
  static XT_INLINE Vec load(const T* p, int n) {
    T t[width] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  XT_INLINE void store(float* p) const { __builtin_memcpy(p, &v, 16); }
  XT_INLINE void store(bf16_t* p) const {
    const Halves h = __builtin_convertvector(rounded() >> 16, Halves);
    __builtin_memcpy(p, &h, 8);
  }
  template <class T>
  XT_INLINE void store(T* p, int n) const {
    T t[width];
    store(t);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }
  // 2 * width elements, the even ones in `even`: cheaper than load() where the order within them does not matter.
  static XT_INLINE void load_pair(const bf16_t* p, Vec& even, Vec& odd) {
    Ints both;
    __builtin_memcpy(&both, p, 16);
    even.v = (Floats)(both << 16);
    odd.v = (Floats)(both & upper_half);
  }
  static XT_INLINE void store_pair(bf16_t* p, Vec even, Vec odd) {
    const Ints both = (Ints)(even.rounded() >> 16) | ((Ints)odd.rounded() & upper_half);
    __builtin_memcpy(p, &both, 16);
  }
  // stream: past the cache elsewhere; the compilers have no common word for it.
  template <class T>
  XT_INLINE void stream(T* p) const {
    store(p);
  }
  static XT_INLINE void stream_pair(bf16_t* p, Vec even, Vec odd) { store_pair(p, even, odd); }
  static XT_INLINE void fence() {}
  static XT_INLINE Vec of(Ints bits) { return {(Floats)bits}; }
  static XT_INLINE Ints load_bytes(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
  // Base plus what the exponent of i, as a float's bits, is above that of Least, if it is. Least is a power of two; a
  // difference is less than 32 and shares no bits with Base's exponent.
  template <int32_t Least, int32_t Base>
  static XT_INLINE Ints exceed(Ints i) {
    const Ints least = Ints{} + Least, at_least = i > least ? i : least;
    const Bits exponent = (Bits)(at_least & 0x7f800000);
    return (Ints)(exponent + static_cast<uint32_t>(Base - Least));  // beyond the largest int for NaN
  }
  // Per lane Low times the signed lower half plus High times the upper half.
  template <int16_t Low, int16_t High>
  static XT_INLINE Ints add_halves(Ints i) {
    return (i << 16 >> 16) * Low + (i >> 16) * High;
  }
  // The signs of 4 * width elements, in the order of codes_of().
  static XT_INLINE Bytes16 signs(const float* p) {
    Ints x[4];
    __builtin_memcpy(x, p, 64);
    return fourth_bytes(x[0], x[1], x[2], x[3]);
  }
  static XT_INLINE Bytes16 signs(const bf16_t* p) {
    Bytes16 x[2];
    __builtin_memcpy(x, p, 32);
    return odd_bytes(x[0], x[1]);
  }
  // The second bytes of lanes in [0, 2^15), or anything for other lanes, with signs, in the order of memory: of vectors
  // that lay there one by one, or as pairs.
  template <class T>
  static XT_INLINE Vec codes_of(Ints a, Ints b, Ints c, Ints d, Bytes16 signs) {
    Bytes16 bytes = fourth_bytes(a << 16, b << 16, c << 16, d << 16);
    if constexpr (sizeof(T) == 2) {
      bytes = __builtin_shufflevector(bytes, bytes, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    }
    return {(Floats)(bytes | (signs & 0x80))};
  }
  // Wider vectors do this to each 16 bytes.
  template <class T>
  static constexpr int code_place(int i) {
    return i;
  }
  template <class T>
  XT_INLINE Vec in_order() const {
    return *this;
  }
  static XT_INLINE Bytes16 odd_bytes(Bytes16 a, Bytes16 b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
  static XT_INLINE Bytes16 fourth_bytes(Ints a, Ints b, Ints c, Ints d) {
    typedef int16_t Shorts __attribute__((vector_size(16)));
    const Shorts ab = __builtin_shufflevector((Shorts)a, (Shorts)b, 1, 3, 5, 7, 9, 11, 13, 15);
    const Shorts cd = __builtin_shufflevector((Shorts)c, (Shorts)d, 1, 3, 5, 7, 9, 11, 13, 15);
    return odd_bytes((Bytes16)ab, (Bytes16)cd);
  }
  // Its 16 bytes; a wider vector stores each of its 16 bytes `step` bytes apart.
  XT_INLINE void store_lanes(uint8_t* to, int64_t) const { __builtin_memcpy(to, &v, 16); }
  // Bytes alternately of a and b, from the low (or high) half of each 16.
  static XT_INLINE Vec interleave_low(Vec a, Vec b) {
    return {(Floats)cpu::interleave_low((Bytes16)a.v, (Bytes16)b.v)};
  }
  static XT_INLINE Vec interleave_high(Vec a, Vec b) {
    return {(Floats)cpu::interleave_high((Bytes16)a.v, (Bytes16)b.v)};
  }
  // 4 * width numbers: in their order when T is float, else as two load_pair()s.
  template <class T, class F>
  static XT_INLINE void load_fp8(const F* p, Vec* to) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* at = &p->bits + (sizeof(T) == 4 ? i * width : i / 2 * 2 * width + i % 2);
      const int step = sizeof(T) == 4 ? 1 : 2;
      to[i] = fp8_values<F, Vec>(Ints{at[0], at[step], at[2 * step], at[3 * step]});
    }
  }
  static XT_INLINE int32_t largest(Ints i) {
    const int32_t a = i[0] > i[1] ? i[0] : i[1], b = i[2] > i[3] ? i[2] : i[3];
    return a > b ? a : b;
  }
  // to[j * to_row + i] = rows[i][at + j] for i, j < block
  template <class Unit, class T>
  static XT_INLINE void transpose(const T* const* rows, int64_t at, float* to, int64_t to_row) {
    const Floats a = load(rows[0] + at).v, b = load(rows[1] + at).v, c = load(rows[2] + at).v, d = load(rows[3] + at).v;
    const Floats ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Floats ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Floats cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    Vec{__builtin_shufflevector(ab, cd, 0, 1, 4, 5)}.store(to);
    Vec{__builtin_shufflevector(ab, cd, 2, 3, 6, 7)}.store(to + to_row);
    Vec{__builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5)}.store(to + 2 * to_row);
    Vec{__builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)}.store(to + 3 * to_row);
  }
};

static XT_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
static XT_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
static XT_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
static XT_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
#ifdef __aarch64__
static XT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
#else
static XT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
#endif
// a > b ? x : y; false where a or b is NaN.
static XT_INLINE Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  const Vec::Ints m = (Vec::Ints)(a.v > b.v);
  return {(Vec::Floats)((m & (Vec::Ints)x.v) | (~m & (Vec::Ints)y.v))};
}
// 2^n for the integer n in the low bits of the float t = n + 1.5 * 2^23.
static XT_INLINE Vec exp2_of_biased(Vec t) { return {(Vec::Floats)(((Vec::Ints)t.v + 127) << 23)}; }
static XT_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

}  // namespace xt::cpu::portable
