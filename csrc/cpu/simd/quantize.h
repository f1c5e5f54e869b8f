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
  // Where the i-th of the numbers lies that load_sizes() loads.
  static constexpr int place(int i) { return i; }
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
    const typename Vec::Ints pairs = (typename Vec::Ints)m, low = pairs << 16, high = pairs & 0x7fff0000;
    __builtin_memcpy(to, &low, sizeof(low));
    __builtin_memcpy(to + Vec::width, &high, sizeof(high));
  }
  static constexpr int place(int i) {
    const int in_pair = i % width;
    return i - in_pair + in_pair % Vec::width * 2 + in_pair / Vec::width;
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

// fp8_codes_256() wants numbers multiplied by this.
template <class F>
constexpr float lift_of() {
  constexpr int lift = Fp8Bits<F>::lift;
  return lift < 0 ? 1.0f / (1 << -lift) : 1 << lift;
}
template <class F>
XT_INLINE float factor_of(float scale) {
  return 1.0f / scale * lift_of<F>();
}

template <class Vec>
XT_INLINE void store_bytes(Vec bytes, uint8_t* to, bool stream) {
  float* p = reinterpret_cast<float*>(to);
  stream ? bytes.stream(p) : bytes.store(p);
}

// The absolute values of 4 * width numbers: of floats in their order, of bfloat16 the even ones of the first half, its
// odd ones, and the same of the second half.
template <class Vec>
XT_INLINE void load_sizes(const float* x, Vec* sizes) {
  for (int i = 0; i < 4; ++i) sizes[i] = Vec::of((typename Vec::Ints)Vec::load(x + i * Vec::width).v & 0x7fffffff);
}
template <class Vec>
XT_INLINE void load_sizes(const bf16_t* x, Vec* sizes) {
  using Ints = typename Vec::Ints;
  for (int i = 0; i < 4; i += 2) {
    const auto both = (Ints)magnitudes<Vec>(x + i * Vec::width);
    sizes[i] = Vec::of(both << 16);
    sizes[i + 1] = Vec::of(both & 0x7fff0000);
  }
}

template <class Vec, class T, class F>
XT_INLINE Vec encode(const Vec* sizes, const Vec* factors, const T* x) {
  const auto code = [&](int i) { return fp8_codes_256<F>(sizes[i] * factors[i]); };
  return Vec::template codes_of<T>(code(0), code(1), code(2), code(3), Vec::signs(x));
}

// q = x * factor / 2^lift
template <class Vec, class T, class F>
XT_INLINE void quantize_as(const T* x, Vec factor, F* q, bool stream) {
  const Vec factors[4] = {factor, factor, factor, factor};
  for (int i = 0; i < fp8_block; i += 4 * Vec::width) {
    Vec sizes[4];
    load_sizes(x + i, sizes);
    store_bytes(encode<Vec, T, F>(sizes, factors, x + i).template in_order<T>(), &q[i].bits, stream);
  }
}

template <class Vec, class T, class F>
XT_INLINE void quantize_block(const T* x, float scale, F* q, bool stream) {
  if (!(scale < __builtin_inff())) return static_cast<void>(__builtin_memset(q, fp8_nan, fp8_block));
  quantize_as<Vec>(x, Vec::all(factor_of<F>(scale)), q, stream);
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

// Codes of a 128 x 128 block of T, so laid out that vectors transpose them: 16 places of all rows lie together, and of
// those the rows r, r + 16, r + 32 ... that fill a vector.
template <class Vec, class T>
struct Turned {
  static constexpr int step = 4 * Vec::width;            // codes in a vector
  static constexpr int64_t group = step;                 // rows that are transposed at once
  static constexpr int64_t place_step = 16 * fp8_block;  // from 16 places to the next
  alignas(64) uint8_t bytes[fp8_block * fp8_block];

  static XT_INLINE int64_t row_start(int64_t r) {
    return r / group * group * 16 + r % 16 * group + r % group / 16 * 16;
  }
  static XT_INLINE int64_t column_of(int64_t place) {
    return place / step * step + Vec::template code_place<T>(static_cast<int>(place % step));
  }

  // Row r, a vector's columns from `col` on, as encode() orders them.
  XT_INLINE void put(int64_t r, int64_t col, Vec codes) {
    codes.store_lanes(bytes + col / 16 * place_step + row_start(r), place_step);
  }
  XT_INLINE void fill_row(int64_t r, uint8_t code) {
    for (int64_t i = 0; i < fp8_block / 16; ++i) __builtin_memset(bytes + i * place_step + row_start(r), code, 16);
  }
  XT_INLINE void fill_column(int64_t place, uint8_t code) {
    uint8_t* const at = bytes + place / 16 * place_step + place % 16;
    for (int64_t r = 0; r < fp8_block; ++r) at[row_start(r)] = code;
  }

  // to[c * to_row + r] = row r, column c. Lines of `to` are written in one go: by way of L1 where vectors are shorter.
  XT_INLINE void store(uint8_t* to, int64_t to_row, bool stream) const {
    for (int64_t place = 0; place < fp8_block; place += 16) {
      const uint8_t* const from = bytes + place * fp8_block;
      if constexpr (group == 64) {
        for (int64_t r = 0; r < fp8_block; r += group) {
          Vec a[16];
          load_transposed(from + r * 16, a);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) store_bytes(a[i], to + column_of(place + i) * to_row + r, stream);
        }
      } else {
        alignas(64) uint8_t lines[16 * fp8_block];
        for (int64_t r = 0; r < fp8_block; r += group) {
          Vec a[16];
          load_transposed(from + r * 16, a);
          for (int i = 0; i < 16; ++i) store_bytes(a[i], lines + i * fp8_block + r, false);
        }
        for (int64_t i = 0; i < 16; ++i) {
          uint8_t* const target = to + column_of(place + i) * to_row;
          for (int64_t r = 0; r < fp8_block; r += group) {
            store_bytes(Vec::load(reinterpret_cast<const float*>(lines + i * fp8_block + r)), target + r, stream);
          }
        }
      }
    }
  }

 private:
  static XT_INLINE void load_transposed(const uint8_t* from, Vec* a) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = Vec::load(reinterpret_cast<const float*>(from + i * group));
    transpose16(a);
  }
};

// One scale for all; num_rows is 128.
template <class Vec, class T, class F>
void quantize_square_typed(const QuantizeTile& a) {
  const T *x = static_cast<const T*>(a.x), *later = static_cast<const T*>(a.later);
  F* q = static_cast<F*>(a.q);
  auto maximum = row_maximum<Vec>(x);
  for (int64_t r = 1; r < fp8_block; ++r) maximum = larger(maximum, row_maximum<Vec>(x + r * a.x_row));
  *a.scale = scale_of<F>(Magnitudes<Vec, T>::largest(maximum), a.rule);
  const bool finite = *a.scale < __builtin_inff();
  const Vec factor = Vec::all(factor_of<F>(*a.scale)), factors[4] = {factor, factor, factor, factor};
  Turned<Vec, T> turned;
  for (int64_t r = 0; r < fp8_block; ++r) {
    if (later) prefetch_block(later + r * a.x_row);
    if (!finite) {
      __builtin_memset(q + r * a.row, fp8_nan, fp8_block);
      turned.fill_row(r, fp8_nan);
      continue;
    }
    for (int64_t i = 0; i < fp8_block; i += 4 * Vec::width) {
      const T* from = x + r * a.x_row + i;
      Vec sizes[4];
      load_sizes(from, sizes);
      const Vec codes = encode<Vec, T, F>(sizes, factors, from);
      store_bytes(codes.template in_order<T>(), &q[r * a.row + i].bits, a.stream);
      turned.put(r, i, codes);
    }
  }
  turned.store(static_cast<uint8_t*>(a.qt), a.qt_row, a.stream);
}

// Maxima of 128 blocks to their scales, and to what fp8_codes_256() wants their numbers multiplied by.
template <class Vec, class F>
XT_INLINE void scales_of(const int32_t* maxima, ScaleRule rule, float* scale, float* factor) {
  using Ints = typename Vec::Ints;
  const Vec eps = Vec::all(rule.eps), largest = Vec::all(Fp8<F>::largest);
  const Vec one = Vec::all(1.0f), lift = Vec::all(lift_of<F>());
  for (int i = 0; i < fp8_block; i += Vec::width) {
    Ints bits;
    __builtin_memcpy(&bits, maxima + i, sizeof(bits));
    const Vec maximum = Vec::of(bits);
    Vec s = select_gt(eps, maximum, eps, maximum) / largest;
    if (rule.power_of_two) {
      const Ints exact = (Ints)s.v, finite = exact < 0x7f800000;
      s = Vec::of(finite ? ((exact & finite) + 0x7fffff) & 0x7f800000 : exact);
    }
    s.store(scale + i);
    (one / s * lift).store(factor + i);
  }
}

// The largest of each row, and of each column.
template <class Vec, class T>
XT_INLINE void tile_maxima(const QuantizeTile& a, int32_t* rows, int32_t* columns) {
  using Lanes = typename Magnitudes<Vec, T>::Lanes;
  constexpr int lanes = Magnitudes<Vec, T>::width;
  const T* x = static_cast<const T*>(a.x);
  Lanes down[fp8_block / lanes] = {};
  for (int64_t r = 0; r < a.num_rows; ++r) {
    Lanes along = {};
    for (int i = 0; i < fp8_block / lanes; ++i) {
      const Lanes m = magnitudes<Vec>(x + r * a.x_row + i * lanes);
      down[i] = larger(down[i], m);
      along = larger(along, m);
    }
    rows[r] = Magnitudes<Vec, T>::largest(along);
  }
  for (int64_t r = a.num_rows; r < fp8_block; ++r) rows[r] = 0;
  for (int i = 0; i < fp8_block / lanes; ++i) Magnitudes<Vec, T>::widen(down[i], columns + i * lanes);
}

// A scale per row for q, a scale per column for qt.
template <class Vec, class T, class F>
void quantize_rowcol_typed(const QuantizeTile& a) {
  constexpr int step = 4 * Vec::width;
  const T *x = static_cast<const T*>(a.x), *later = static_cast<const T*>(a.later);
  F* q = static_cast<F*>(a.q);
  alignas(64) int32_t maxima[fp8_block], maxima_t[fp8_block];
  alignas(64) float scale[fp8_block], factor[fp8_block], scale_t[fp8_block], factor_t[fp8_block];
  tile_maxima<Vec, T>(a, maxima, maxima_t);
  scales_of<Vec, F>(maxima, a.rule, scale, factor);
  scales_of<Vec, F>(maxima_t, a.rule, scale_t, factor_t);
  Turned<Vec, T> turned;
  for (int64_t r = 0; r < a.num_rows; ++r) {
    a.scale[r] = scale[r];
    const Vec all = Vec::all(factor[r]), factors[4] = {all, all, all, all};
    if (later) prefetch_block(later + r * a.x_row);
    for (int64_t i = 0; i < fp8_block; i += step) {
      const T* from = x + r * a.x_row + i;
      Vec sizes[4], factors_t[4];
      load_sizes(from, sizes);
      for (int j = 0; j < 4; ++j) factors_t[j] = Vec::load(factor_t + i + j * Vec::width);
      const Vec codes = encode<Vec, T, F>(sizes, factors, from);
      store_bytes(codes.template in_order<T>(), &q[r * a.row + i].bits, a.stream);
      turned.put(r, i, encode<Vec, T, F>(sizes, factors_t, from));
    }
    if (!(scale[r] < __builtin_inff())) __builtin_memset(q + r * a.row, fp8_nan, fp8_block);
  }
  for (int i = 0; i < fp8_block; ++i) a.scale_t[Magnitudes<Vec, T>::place(i)] = scale_t[i];
  for (int i = 0; i < fp8_block; ++i) {
    if (!(a.scale_t[turned.column_of(i)] < __builtin_inff())) turned.fill_column(i, fp8_nan);
  }
  for (int64_t r = a.num_rows; r < fp8_block; ++r) turned.fill_row(r, 0);
  turned.store(static_cast<uint8_t*>(a.qt), a.qt_row, a.stream);
}

template <class Vec>
XT_INLINE void store_numbers(const Vec* v, float* to) {
  for (int i = 0; i < 4; ++i) v[i].store(to + i * Vec::width);
}
template <class Vec>
XT_INLINE void store_numbers(const Vec* v, bf16_t* to) {
  for (int i = 0; i < 4; i += 2) Vec::store_pair(to + i * Vec::width, v[i], v[i + 1]);
}

template <class Vec, class F, class T>
void dequantize_rows_typed(const DequantizeRows& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const F* q = static_cast<const F*>(a.q) + r * a.hidden;
    T* x = static_cast<T*>(a.x) + r * a.hidden;
    const float* scale = a.scale + r / a.rows_per_scale * a.scale_row;
    for (int64_t h = 0; h < a.hidden; h += fp8_block, scale += a.scale_col) {
      const Vec s = Vec::all(*scale);
      for (int i = 0; i < fp8_block; i += 4 * Vec::width) {
        Vec v[4];
        Vec::template load_fp8<T>(q + h + i, v);
        for (int j = 0; j < 4; ++j) v[j] = v[j] * s;
        store_numbers(v, x + h + i);
      }
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
