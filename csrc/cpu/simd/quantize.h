// float8 with one scale per 128 values: x ~ q * scale. Scales come from the largest absolute value of their block.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/fp8.h"
#include "cpu/simd/transpose_bytes.h"

namespace xt::cpu {

constexpr int64_t fp8_block = 128;

// Absolute values as integers: these are ordered as the numbers are, and NaN stands above infinity, so that it survives
// a maximum.
template <class Vec, class T>
struct Magnitudes {
  using Lanes = typename Vec::Ints;
  static constexpr int width = Vec::width;
  static constexpr int32_t mask = 0x7fffffff;
  static XT_INLINE int32_t largest(Lanes m) { return Vec::largest(m); }
  static XT_INLINE void widen(Lanes m, int32_t* to) { __builtin_memcpy(to, &m, sizeof(m)); }
};
template <class Vec>
struct Magnitudes<Vec, bf16_t> {
  typedef int16_t Lanes __attribute__((vector_size(4 * Vec::width)));
  static constexpr int width = 2 * Vec::width;
  static constexpr int16_t mask = 0x7fff;
  static XT_INLINE int32_t largest(Lanes m) {
    const typename Vec::Ints pairs = (typename Vec::Ints)m, low = pairs << 16, high = pairs & 0x7fff0000;
    return Vec::largest(low > high ? low : high);
  }
  static XT_INLINE void widen(Lanes m, int32_t* to) {
    int16_t high[width];
    __builtin_memcpy(high, &m, sizeof(m));
    for (int i = 0; i < width; ++i) to[i] = high[i] << 16;
  }
};

template <class Vec, class T>
XT_INLINE typename Magnitudes<Vec, T>::Lanes magnitudes(const T* x) {
  typename Magnitudes<Vec, T>::Lanes m;
  __builtin_memcpy(&m, x, sizeof(m));
  return m & Magnitudes<Vec, T>::mask;
}

template <class Lanes>
XT_INLINE Lanes larger(Lanes a, Lanes b) {
  return a > b ? a : b;
}

template <class Vec, class T>
XT_INLINE typename Magnitudes<Vec, T>::Lanes row_maximum(const T* x) {
  constexpr int width = Magnitudes<Vec, T>::width;
  auto m = magnitudes<Vec>(x);
  for (int i = width; i < fp8_block; i += width) m = larger(m, magnitudes<Vec>(x + i));
  return m;
}

template <class F>
XT_INLINE float scale_of(int32_t maximum_bits, ScaleRule rule) {
  float maximum;
  __builtin_memcpy(&maximum, &maximum_bits, 4);
  const float scale = (maximum < rule.eps ? rule.eps : maximum) / Fp8<F>::largest;
  if (!rule.power_of_two || !(scale < __builtin_inff())) return scale;
  int32_t bits;
  __builtin_memcpy(&bits, &scale, 4);
  bits = (bits + 0x7fffff) & 0x7f800000;  // up to the next power of two
  float rounded;
  __builtin_memcpy(&rounded, &bits, 4);
  return rounded;
}

template <class Vec>
XT_INLINE Vec factor(Vec v, int) {
  return v;
}
template <class Vec>
XT_INLINE Vec factor(const float* each, int i) {
  return Vec::load(each + i);
}

template <class Vec>
XT_INLINE void store_bytes(Vec bytes, uint8_t* to, bool stream) {
  float* p = reinterpret_cast<float*>(to);
  stream ? bytes.stream(p) : bytes.store(p);
}

// q = x * inverse; `inverse` is a Vec, or a float for each of the 128.
template <class Vec, class T, class Inverse, class F>
XT_INLINE void quantize_as(const T* x, Inverse inverse, F* q, bool stream) {
  constexpr int w = Vec::width;
  for (int i = 0; i < fp8_block; i += 4 * w) {
    const auto codes = [&](int at) { return fp8_codes<F>(Vec::load(x + i + at) * factor<Vec>(inverse, i + at)); };
    store_bytes(Vec::pack_bytes(codes(0), codes(w), codes(2 * w), codes(3 * w)), &q[i].bits, stream);
  }
}

template <class Vec, class T, class F>
XT_INLINE void quantize_block(const T* x, float scale, F* q, bool stream) {
  if (!(scale < __builtin_inff())) return static_cast<void>(__builtin_memset(q, fp8_nan, fp8_block));
  quantize_as<Vec>(x, Vec::all(1.0f / scale), q, stream);
}

// Fetches a block that is read soon into L2, while there is something to compute.
template <class T>
XT_INLINE void prefetch_block(const T* x) {
  constexpr int line = 64 / sizeof(T);
  for (int i = 0; i < fp8_block; i += line) __builtin_prefetch(x + i, 0, 2);
}

template <class Vec, class T, class F>
void quantize_rows_typed(const QuantizeRows& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.hidden;
    F* q = static_cast<F*>(a.q) + r * a.hidden;
    float* scale = a.scale + r;
    // In two steps, so that the latency of one block's scale hides behind other blocks' work.
    for (int64_t h = 0; h < a.hidden; h += fp8_block) {
      scale[h / fp8_block * a.scale_row] = scale_of<F>(Magnitudes<Vec, T>::largest(row_maximum<Vec>(x + h)), a.rule);
    }
    for (int64_t h = 0; h < a.hidden; h += fp8_block) {
      if (r + 1 < end) prefetch_block(x + a.hidden + h);
      quantize_block<Vec>(x + h, scale[h / fp8_block * a.scale_row], q + h, a.stream);
    }
  }
  if (a.stream) Vec::fence();
}

template <class Vec>
XT_INLINE void copy_block(const uint8_t* from, uint8_t* to, bool stream) {
  for (int i = 0; i < fp8_block; i += 4 * Vec::width) {
    store_bytes(Vec::load(reinterpret_cast<const float*>(from + i)), to + i, stream);
  }
}

// to[j, i] = from[i, j] for a whole block, by way of memory in L1: lines of `to` are written in one go.
template <class Vec>
XT_INLINE void transpose_block(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row, bool stream) {
  alignas(64) uint8_t lines[16 * fp8_block];
  for (int64_t j = 0; j < fp8_block; j += 16) {
    for (int64_t i = 0; i < fp8_block; i += 16) {
      transpose_bytes16(from + i * from_row + j, from_row, lines + i, fp8_block);
    }
    for (int64_t k = 0; k < 16; ++k) copy_block<Vec>(lines + k * fp8_block, to + (j + k) * to_row, stream);
  }
}

// One scale for all; num_rows is 128.
template <class Vec, class T, class F>
void quantize_square_typed(const QuantizeTile& a) {
  const T *x = static_cast<const T*>(a.x), *next = static_cast<const T*>(a.next);
  F* q = static_cast<F*>(a.q);
  auto maximum = row_maximum<Vec>(x);
  for (int64_t r = 1; r < fp8_block; ++r) maximum = larger(maximum, row_maximum<Vec>(x + r * a.row));
  *a.scale = scale_of<F>(Magnitudes<Vec, T>::largest(maximum), a.rule);
  alignas(64) F codes[fp8_block * fp8_block];
  for (int64_t r = 0; r < fp8_block; ++r) {
    F* row = codes + r * fp8_block;
    if (next) prefetch_block(next + r * a.row);
    quantize_block<Vec>(x + r * a.row, *a.scale, row, false);
    copy_block<Vec>(&row->bits, &q[r * a.row].bits, a.stream);
  }
  transpose_block<Vec>(&codes->bits, fp8_block, static_cast<uint8_t*>(a.qt), a.qt_row, a.stream);
}

// A scale per row for q, a scale per column for qt.
template <class Vec, class T, class F>
void quantize_rowcol_typed(const QuantizeTile& a) {
  using Lanes = typename Magnitudes<Vec, T>::Lanes;
  constexpr int lanes = Magnitudes<Vec, T>::width;
  const T *x = static_cast<const T*>(a.x), *next = static_cast<const T*>(a.next);
  F* q = static_cast<F*>(a.q);
  Lanes columns[fp8_block / lanes] = {};
  for (int64_t r = 0; r < a.num_rows; ++r) {
    Lanes maximum = {};
    for (int i = 0; i < fp8_block / lanes; ++i) {
      const Lanes m = magnitudes<Vec>(x + r * a.row + i * lanes);
      columns[i] = larger(columns[i], m);
      maximum = larger(maximum, m);
    }
    a.scale[r] = scale_of<F>(Magnitudes<Vec, T>::largest(maximum), a.rule);
  }
  alignas(64) int32_t maxima[fp8_block];
  alignas(64) float inverse_t[fp8_block];
  for (int i = 0; i < fp8_block / lanes; ++i) Magnitudes<Vec, T>::widen(columns[i], maxima + i * lanes);
  bool finite = true;
  for (int i = 0; i < fp8_block; ++i) {
    a.scale_t[i] = scale_of<F>(maxima[i], a.rule);
    inverse_t[i] = 1.0f / a.scale_t[i];
    finite = finite && a.scale_t[i] < __builtin_inff();
  }
  alignas(64) F turned[fp8_block * fp8_block];
  for (int64_t r = 0; r < a.num_rows; ++r) {
    const T* row = x + r * a.row;
    if (next) prefetch_block(next + r * a.row);
    quantize_block<Vec>(row, a.scale[r], q + r * a.row, a.stream);
    quantize_as<Vec>(row, static_cast<const float*>(inverse_t), turned + r * fp8_block, false);
  }
  for (int i = 0; i < fp8_block && !finite; ++i) {
    if (a.scale_t[i] < __builtin_inff()) continue;
    for (int64_t r = 0; r < a.num_rows; ++r) turned[r * fp8_block + i].bits = fp8_nan;
  }
  __builtin_memset(turned + a.num_rows * fp8_block, 0, static_cast<size_t>((fp8_block - a.num_rows) * fp8_block));
  transpose_block<Vec>(&turned->bits, fp8_block, static_cast<uint8_t*>(a.qt), a.qt_row, a.stream);
}

template <class Vec, class F, class T>
void dequantize_rows_typed(const DequantizeRows& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const F* q = static_cast<const F*>(a.q) + r * a.hidden;
    T* x = static_cast<T*>(a.x) + r * a.hidden;
    const float* scale = a.scale + r / a.rows_per_scale * a.scale_row;
    for (int64_t h = 0; h < a.hidden; h += fp8_block, scale += a.scale_col) {
      const Vec s = Vec::all(*scale);
#pragma GCC unroll 8
      for (int i = 0; i < fp8_block; i += Vec::width) (Vec::load(q + h + i) * s).store(x + h + i);
    }
  }
}

template <class Vec, class T>
XT_INLINE void quantize_rows_from(const QuantizeRows& a, int64_t begin, int64_t end) {
  a.to == DType::e4m3 ? quantize_rows_typed<Vec, T, e4m3_t>(a, begin, end)
                      : quantize_rows_typed<Vec, T, e5m2_t>(a, begin, end);
}

template <class Vec>
void quantize_rows(const QuantizeRows& a, int64_t begin, int64_t end) {
  a.from == DType::f32 ? quantize_rows_from<Vec, float>(a, begin, end) : quantize_rows_from<Vec, bf16_t>(a, begin, end);
}

template <class Vec, class T>
XT_INLINE void quantize_tile_from(const QuantizeTile& a) {
  if (a.to == DType::e4m3) {
    a.scale_t ? quantize_rowcol_typed<Vec, T, e4m3_t>(a) : quantize_square_typed<Vec, T, e4m3_t>(a);
  } else {
    a.scale_t ? quantize_rowcol_typed<Vec, T, e5m2_t>(a) : quantize_square_typed<Vec, T, e5m2_t>(a);
  }
}

template <class Vec>
void quantize_tile(const QuantizeTile& a) {
  a.from == DType::f32 ? quantize_tile_from<Vec, float>(a) : quantize_tile_from<Vec, bf16_t>(a);
  if (a.stream) Vec::fence();
}

template <class Vec, class F>
XT_INLINE void dequantize_rows_of(const DequantizeRows& a, int64_t begin, int64_t end) {
  a.to == DType::f32 ? dequantize_rows_typed<Vec, F, float>(a, begin, end)
                     : dequantize_rows_typed<Vec, F, bf16_t>(a, begin, end);
}

template <class Vec>
void dequantize_rows(const DequantizeRows& a, int64_t begin, int64_t end) {
  a.from == DType::e4m3 ? dequantize_rows_of<Vec, e4m3_t>(a, begin, end)
                        : dequantize_rows_of<Vec, e5m2_t>(a, begin, end);
}

}  // namespace xt::cpu
