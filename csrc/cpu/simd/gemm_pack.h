// Copies of operand blocks in the order the innermost loop reads them, widened to fp32.
#pragma once
#include "cpu/gemm.h"
#include "cpu/simd/bf16.h"

namespace xt::cpu {

template <class T>
XT_INLINE float as_float(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *p;
  } else {
    return widen(*p);
  }
}

// to[i] = from[i], widened
template <class Vec, class T>
XT_INLINE void widen_row(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::load(from + i).store(to + i);
  for (; i < n; ++i) to[i] = as_float(from + i);
}

// V whose rows run along v: row k of all panels, num_v columns, then row k + 1. Reading whole rows streams well from
// memory. Panel p holds V's columns [p * cols, (p + 1) * cols) as to[p * panel + k * cols + j], zero past num_v.
template <class Vec, class T>
void pack_panels_copied(const T* from, int64_t col, int64_t num_v, int64_t num_k, float* to, int64_t panel) {
  constexpr int64_t cols = 2 * Vec::width;
  constexpr int64_t ahead = 8;  // rows
  for (int64_t k = 0; k < num_k; ++k, from += col, to += cols) {
    float* out = to;
    int64_t v = 0;
    for (; v + cols <= num_v; v += cols, out += panel) {
      __builtin_prefetch(from + ahead * col + v);
      Vec::load(from + v).store(out);
      Vec::load(from + v + Vec::width).store(out + Vec::width);
    }
    if (v < num_v) {
      for (int64_t j = 0; j < cols; ++j) out[j] = v + j < num_v ? as_float(from + v + j) : 0.0f;
    }
  }
}

// One panel of V whose rows run along k: to[k * cols + j] = V[v + j, k], zero from column n on.
template <class Vec, class T>
void pack_panel_transposed(const T* from, int64_t row, int64_t n, int64_t num_k, float* to) {
  constexpr int64_t cols = 2 * Vec::width, block = Vec::block;
  for (int64_t j = 0; j < cols; j += block) {
    int64_t k = 0;
    if (j + block <= n) {
      for (; k + block <= num_k; k += block) Vec::transpose(from + j * row + k, row, to + k * cols + j, cols);
    }
    for (; k < num_k; ++k) {
      for (int64_t i = j; i < j + block; ++i) to[k * cols + i] = i < n ? as_float(from + i * row + k) : 0.0f;
    }
  }
}

// Rows of Q that run along k, one after the other, `to_row` apart.
template <class Vec, class T>
void pack_rows(const T* from, int64_t row, int64_t num_q, int64_t num_k, float* to, int64_t to_row) {
  for (int64_t i = 0; i < num_q; ++i) widen_row<Vec>(from + i * row, to + i * to_row, num_k);
}

// Rows of Q that run along q, in groups of tile_rows: to[group][k][place in group]; the last group may be short.
template <class Vec, class T>
void pack_groups(const T* from, int64_t col, int64_t num_q, int64_t num_k, float* to) {
  constexpr int64_t rows = Vec::tile_rows;
  for (int64_t q = 0; q < num_q; q += rows) {
    const T* p = from + q;
    if (num_q - q >= rows) {
      for (int64_t k = 0; k < num_k; ++k, p += col, to += rows) {
        for (int64_t i = 0; i < rows; ++i) to[i] = as_float(p + i);
      }
    } else {
      for (int64_t k = 0; k < num_k; ++k, p += col, to += rows) {
        for (int64_t i = 0; i < num_q - q; ++i) to[i] = as_float(p + i);
      }
    }
  }
}

}  // namespace xt::cpu
