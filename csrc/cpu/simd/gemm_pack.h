// Copies of operand blocks in the order the innermost loop reads them, in units of 32 bits: floats, or pairs of
// neighbouring bfloat16 along k, the last one filled up with zero. What is narrower is widened on the way.
#pragma once
#include "cpu/gemm.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/fp8.h"
#include "cpu/simd/gemm_micro.h"
#include "cpu/simd/transpose_bytes.h"

namespace xt::cpu {

template <class T>
XT_INLINE float as_float(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *p;
  } else {
    return widen(*p);
  }
}

XT_INLINE float pair(bf16_t even, bf16_t odd) {
  const uint32_t bits = static_cast<uint32_t>(odd) << 16 | even;
  float unit;
  __builtin_memcpy(&unit, &bits, 4);
  return unit;
}

// A block of an operand as lines of neighbouring elements: line j begins at (*this)[j].
template <class T>
struct Lines {
  const T* data;
  int64_t stride;
  const int32_t* index;  // see GemmSide
  int32_t divisor;
  const T* zeros;

  XT_INLINE const T* operator[](int64_t j) const {
    if (!index) return data + j * stride;
    return index[j] < 0 ? zeros : data + index[j] / divisor * stride;
  }
};

// Element j of up to `Unit::elements` lines, one below the other along k, as one unit.
template <class Unit, class T>
XT_INLINE float unit_across(const T* line, const T* next, int64_t j) {
  if constexpr (Unit::elements == 2) {
    return pair(line[j], next ? next[j] : bf16_t{0});
  } else {
    return as_float(line + j);
  }
}

// Lane i: the float8 numbers of codes even[i] and odd[i] as a pair of bfloat16.
template <class F, class Vec>
XT_INLINE Vec fp8_pairs(typename Vec::Ints even, typename Vec::Ints odd) {
  using Ints = typename Vec::Ints;
  const Ints low = (Ints)fp8_values<F, Vec>(even).v, high = (Ints)fp8_values<F, Vec>(odd).v;
  return Vec::of(high | ((low >> 16) & 0xffff));
}

// Vec::width units of a line.
template <class Vec, class Unit, class T>
XT_INLINE Vec units_along(const T* line) {
  if constexpr (Unit::elements == 1) {
    return Vec::load(line);
  } else if constexpr (sizeof(T) == 2) {
    return Vec::load_units(line);
  } else {
    const auto codes = (typename Vec::Ints)Vec::load_pairs(reinterpret_cast<const bf16_t*>(line)).v;
    return fp8_pairs<T, Vec>(codes & 0xff, codes >> 8);
  }
}

// The first n elements of a line as units; meanwhile as many of a later line are brought closer. float8 lines are
// padded: whole vectors are copied.
template <class Vec, class Unit, class T>
XT_INLINE void copy_units(const T* line, const T* later, int64_t n, float* to) {
  constexpr int64_t step = Vec::width * Unit::elements, cache_line = 64 / sizeof(T);
  constexpr bool padded = sizeof(T) == 1;
  int64_t i = 0;
  for (; padded ? i < n : i + step <= n; i += step) {
    if (i % cache_line == 0) __builtin_prefetch(later + i);
    if constexpr (step > cache_line) __builtin_prefetch(later + i + cache_line);
    units_along<Vec, Unit>(line + i).store(to + i / Unit::elements);
  }
  if constexpr (!padded) {
    for (; i < n; i += Unit::elements) {
      to[i / Unit::elements] = unit_across<Unit>(line + i, i + 1 < n ? line + i + 1 : nullptr, 0);
    }
  }
}

// `width` neighbouring elements of those lines.
template <class Vec, class Unit, class T>
XT_INLINE Vec units_across(const T* line, const T* next, int64_t j) {
  if constexpr (Unit::elements == 2) {
    return next ? Vec::load_pairs(line + j, next + j) : Vec::load_pairs(line + j);
  } else {
    return Vec::load(line + j);
  }
}

// V whose lines run along v: all columns of the first unit, then of the next. Reading whole lines streams well from
// memory. Panel p holds columns [p * cols, (p + 1) * cols) as to[p * panel + unit * cols + j], zero past num_v.
template <class Vec, class Unit, class T>
void pack_panels_copied(const Lines<T>& lines, int64_t v0, int64_t num_v, int64_t k0, int64_t k1, float* to,
                        int64_t panel) {
  constexpr int64_t cols = 2 * Vec::width;
  constexpr int64_t ahead = 8;  // lines
  for (int64_t k = k0; k < k1; k += Unit::elements, to += cols) {
    const T* line = lines[k] + v0;
    const T* next = Unit::elements == 2 && k + 1 < k1 ? lines[k + 1] + v0 : nullptr;
    const T* later = k + ahead < k1 ? lines[k + ahead] + v0 : line;
    float* out = to;
    int64_t v = 0;
    for (; v + cols <= num_v; v += cols, out += panel) {
      __builtin_prefetch(later + v);
      if constexpr (cols * sizeof(T) > 64) __builtin_prefetch(later + v + Vec::width);
      units_across<Vec, Unit>(line, next, v).store(out);
      units_across<Vec, Unit>(line, next, v + Vec::width).store(out + Vec::width);
    }
    if (v < num_v) {
      for (int64_t j = 0; j < cols; ++j) out[j] = v + j < num_v ? unit_across<Unit>(line, next, v + j) : 0.0f;
    }
  }
}

// One panel of V whose lines run along k: to[unit * cols + j] = unit of line v + j, zero for n <= j < used.
template <class Vec, class Unit, class T>
void pack_panel_transposed(const Lines<T>& lines, int64_t v, int64_t n, int64_t used, int64_t k0, int64_t k1,
                           float* to) {
  constexpr int64_t cols = 2 * Vec::width, block = Vec::block, step = block * Unit::elements;
  for (int64_t j = 0; j < used; j += block) {
    const T* rows[block];
    for (int64_t i = 0; i < block; ++i) rows[i] = j + i < n ? lines[v + j + i] : nullptr;
    int64_t k = k0;
    float* out = to + j;
    if (j + block <= n) {
      for (; k + step <= k1; k += step, out += block * cols) Vec::template transpose<Unit>(rows, k, out, cols);
    }
    for (; k < k1; k += Unit::elements, out += cols) {
      for (int64_t i = 0; i < block; ++i) out[i] = rows[i] ? unit_across<Unit>(rows[i] + k, k + 1 < k1 ? rows[i] + k + 1 : nullptr, 0) : 0.0f;
    }
  }
}

// The same for float8, turned as bytes before it is widened.
template <class Vec, class Unit, class F>
void pack_panel_fp8(const Lines<F>& lines, int64_t v, int64_t n, int64_t used, int64_t k0, int64_t k1, float* to) {
  constexpr int64_t cols = 2 * Vec::width, block = cols < 16 ? cols : 16;
  for (int64_t j = 0; j < used; j += block) {
    float* out = to + j;
    for (int64_t k = k0; k < k1; k += 16) {
      F rows[16 * 16] = {}, turned[16 * 16];
      for (int64_t i = 0; i < block && j + i < n; ++i) {
        __builtin_memcpy(rows + i * 16, lines[v + j + i] + k, 16);
        __builtin_prefetch(lines[v + j + i] + k + 128);
      }
      transpose_bytes16(&rows->bits, 16, &turned->bits, 16);
      for (int64_t i = 0; i < 16; i += Unit::elements, out += cols) {
        for (int64_t l = 0; l < block; l += Vec::width) {
          const F* at = turned + i * 16 + l;
          if constexpr (Unit::elements == 2) {
            fp8_pairs<F, Vec>(Vec::load_bytes(&at->bits), Vec::load_bytes(&at[16].bits)).store(out + l);
          } else {
            Vec::load(at).store(out + l);
          }
        }
      }
    }
  }
}

// Lines of Q that run along k, one after the other, `to_row` apart.
template <class Vec, class Unit, class T>
void pack_rows(const Lines<T>& lines, int64_t q, int64_t num_q, int64_t k0, int64_t k1, float* to, int64_t to_row) {
  constexpr int64_t ahead = 8;  // lines
  for (int64_t i = 0; i < num_q; ++i) {
    const T* line = lines[q + i] + k0;
    const T* later = num_q <= 2 * ahead ? line + (k1 - k0) : lines[q + (i + ahead < num_q ? i + ahead : i)] + k0;
    copy_units<Vec, Unit>(line, later, k1 - k0, to + i * to_row);
  }
}

// From one group of pack_groups to the next: `units` times tile_rows, and what the last whole vector runs over.
template <class Vec>
XT_INLINE int64_t group_size(int64_t units) {
  constexpr int64_t rows = Vec::tile_rows, vectors = (rows + Vec::width - 1) / Vec::width * Vec::width;
  return units * rows + vectors - rows;
}

// Lines of Q that run along q, in groups of tile_rows: to[group][unit][place in group]; the last group may be short.
// Whole vectors are written; what runs over a unit's end is overwritten by the next.
template <class Vec, class Unit, class T>
void pack_groups(const Lines<T>& lines, int64_t q, int64_t num_q, int64_t k0, int64_t k1, float* to) {
  constexpr int64_t rows = Vec::tile_rows, vectors = (rows + Vec::width - 1) / Vec::width * Vec::width;
  constexpr int64_t ahead = 8;  // lines
  const int64_t group = group_size<Vec>((k1 - k0 + Unit::elements - 1) / Unit::elements);
  for (int64_t k = k0; k < k1; k += Unit::elements, to += rows) {
    const T* line = lines[k] + q;
    const T* next = Unit::elements == 2 && k + 1 < k1 ? lines[k + 1] + q : nullptr;
    const T* later = k + ahead < k1 ? lines[k + ahead] + q : line;
    float* out = to;
    int64_t i = 0;
    for (; i + vectors <= num_q; i += rows, out += group) {
      __builtin_prefetch(later + i);
      for (int64_t j = 0; j < vectors; j += Vec::width) units_across<Vec, Unit>(line, next, i + j).store(out + j);
    }
    for (; i < num_q; i += rows, out += group) {
      for (int64_t j = 0; j < rows && i + j < num_q; ++j) out[j] = unit_across<Unit>(line, next, i + j);
    }
  }
}

}  // namespace xt::cpu
