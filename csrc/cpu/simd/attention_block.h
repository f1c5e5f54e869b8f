// What both directions of attention share: block sizes, copies of operand rows, and products of blocks.
// Rows of queries are ordered by token, then by query head of the group, so that the number of keys a row may look at
// never falls from one row to the next.
#pragma once
#include "cpu/attention.h"
#include "cpu/simd/gemm_micro.h"
#include "cpu/simd/gemm_pack.h"

namespace xt::cpu {

template <class Vec>
struct AttentionSizes {
  static constexpr int64_t rows = Vec::tile_rows, cols = 2 * Vec::width;  // one register tile
  static constexpr int64_t slice = 4 * rows;                             // rows of queries worked on at a time
  static constexpr int64_t step = rows % 7 == 0 ? 7 * cols : rows % 3 == 0 ? 3 * cols : cols;
  static constexpr int64_t keys = (191 + step) / step * step;  // per block: whole tiles along both sides
  static constexpr int64_t keys_row = keys + 16;               // row length of a block of scores

  // Row length of a copy with this many columns: whole vectors, and no power of two, so that rows do not fight for the
  // same cache sets.
  static int64_t padded(int64_t width) { return (width + Vec::width - 1) / Vec::width * Vec::width + 16; }
};

// The operand whose values are broadcast: element (i, k) is data[i * row + k * col].
struct Broadcast {
  const float* data;
  int64_t row, col;
};

// The operand that fills vectors: columns [j * cols, (j + 1) * cols) of row k begin at data[j * panel + k * row].
struct Panels {
  const float* data;
  int64_t row, panel;
};

struct Extent {
  int64_t begin, end;
};

// sums[i, j] += sum over k of q[i, k] * v[k, j] for i < num_rows, j < num_cols (rounded up to whole vectors).
// extent(i0, i1, j0) says which k count for a register tile; an empty one leaves the tile as it is.
template <class Vec, class ExtentOf>
XT_INLINE void multiply(int64_t num_rows, int64_t num_cols, Broadcast q, Panels v, float* sums, int64_t sums_row,
                        bool add, ExtentOf extent) {
  constexpr int64_t rows = AttentionSizes<Vec>::rows, cols = AttentionSizes<Vec>::cols;
  for (int64_t j = 0; j < num_cols; j += cols, v.data += v.panel) {
    for (int64_t i = 0; i < num_rows; i += rows) {
      const int64_t m = num_rows - i < rows ? num_rows - i : rows;
      const Extent k = extent(i, i + m, j);
      if (k.begin >= k.end) continue;
      const MicroFn fn = num_cols - j > Vec::width ? micro_for<Vec, Single, 2>(m) : micro_for<Vec, Single, 1>(m);
      fn(k.end - k.begin, q.data + i * q.row + k.begin * q.col, q.row, q.col, v.data + k.begin * v.row, v.row,
         sums + i * sums_row + j, sums_row, add ? Store::add : Store::set);
    }
  }
}

// to[i] = factor * from[i], zero up to the next whole vector
template <class Vec, class T>
XT_INLINE void copy_scaled(const T* from, float factor, float* to, int64_t n) {
  const Vec f = Vec::all(factor);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) (f * Vec::load(from + i)).store(to + i);
  if (i < n) (f * Vec::load(from + i, static_cast<int>(n - i))).store(to + i);
}

// to[i] = factor * from[i], rounded to T
template <class Vec, class T>
XT_INLINE void write_scaled(const float* from, float factor, T* to, int64_t n) {
  const Vec f = Vec::all(factor);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) (f * Vec::load(from + i)).store(to + i);
  if (i < n) (f * Vec::load(from + i, static_cast<int>(n - i))).store(to + i, static_cast<int>(n - i));
}

// The rows of one task, as both directions address them.
template <class Vec, class T>
class AttentionRows {
 public:
  using Sizes = AttentionSizes<Vec>;

  AttentionRows(const AttentionProblem& p, const AttentionTask& t) : p_(p), t_(t) {}

 protected:
  int64_t num_rows() const { return t_.num_queries() * p_.group; }
  int64_t token(int64_t row) const { return t_.q_begin + row / p_.group; }
  int64_t head(int64_t row) const { return t_.kv_head * p_.group + row % p_.group; }
  float& lse(int64_t row) const { return p_.lse[head(row) * p_.num_q + token(row)]; }

  T* query(const HeadRows& x, int64_t row) const {
    return static_cast<T*>(x.data) + token(row) * x.token + head(row) * x.head;
  }
  T* key(const HeadRows& x, int64_t n) const {
    return static_cast<T*>(x.data) + (t_.k_begin + n) * x.token + t_.kv_head * x.head;
  }

  // visible[i]: how many of the keys [k0, k0 + n) row r0 + i may look at.
  void visible_keys(int64_t r0, int64_t m, int64_t k0, int64_t n, int64_t* visible) const {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t some = t_.visible(token(r0 + i), p_.causal) - k0;
      visible[i] = some < 0 ? 0 : some < n ? some : n;
    }
  }

  // The first row that may look at key k.
  int64_t first_row(int64_t k) const {
    int64_t row = 0;
    if (p_.causal && k >= t_.first_visible) row = (k + 1 - t_.first_visible) * p_.group;
    return row;
  }

  void copy_queries(const HeadRows& x, int64_t width, float factor, int64_t r0, int64_t m, float* to) const {
    const int64_t row = Sizes::padded(width);
    for (int64_t i = 0; i < m; ++i) copy_scaled<Vec>(query(x, r0 + i), factor, to + i * row, width);
  }

  void copy_keys(const HeadRows& x, int64_t width, int64_t k0, int64_t n, float* to) const {
    const int64_t row = Sizes::padded(width);
    for (int64_t i = 0; i < n; ++i) copy_scaled<Vec>(key(x, k0 + i), 1.0f, to + i * row, width);
  }

  // Panels whose columns are keys.
  void turn_keys(const HeadRows& x, int64_t width, int64_t k0, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; i += Sizes::cols, to += Sizes::cols * width) {
      const Lines<T> keys = {key(x, k0 + i), x.token, nullptr, 1, nullptr};
      const int64_t num_keys = n - i < Sizes::cols ? n - i : Sizes::cols;
      pack_panel_transposed<Vec, Single>(keys, 0, num_keys, Sizes::cols, 0, width, to);
    }
  }

  static Panels turned(const float* data, int64_t width) { return {data, Sizes::cols, Sizes::cols * width}; }
  static Panels straight(const float* data, int64_t width) { return {data, Sizes::padded(width), Sizes::cols}; }

  const AttentionProblem& p_;
  const AttentionTask& t_;
};

}  // namespace xt::cpu
