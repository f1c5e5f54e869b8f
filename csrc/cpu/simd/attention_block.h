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
  static constexpr int64_t slice = 56 / rows * rows;                        // rows of queries worked on at a time
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
      const bool wide = num_cols - j > Vec::width;
      const MicroFn<float> fn = wide ? micro_for<Vec, Single, float, 2>(m) : micro_for<Vec, Single, float, 1>(m);
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

// Which lanes of a last, partial vector count.
template <class Vec>
class TailMask {
 public:
  TailMask() {
    for (int i = 0; i < 2 * Vec::width; ++i) signs_[i] = i < Vec::width ? 1.0f : -1.0f;
  }
  // x in the first n lanes, else y
  XT_INLINE Vec select(int64_t n, Vec x, Vec y) const {
    return select_gt(Vec::load(signs_ + Vec::width - n), Vec::zero(), x, y);
  }

 private:
  float signs_[2 * Vec::width];
};

// x[begin..end) = 0, in whole vectors
template <class Vec>
XT_INLINE void clear_vectors(float* x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += Vec::width) Vec::zero().store(x + i);
}

// Asks for a row that will be read or written soon. Heads are short rows far apart, which hardware does not foresee.
template <class T>
XT_INLINE void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(row + i);
}

// The rows of one task, as both directions address them.
template <class Vec, class T>
class AttentionRows {
 public:
  using Sizes = AttentionSizes<Vec>;

  AttentionRows(const AttentionProblem& p, const AttentionTask& t) : p_(p), t_(t) {}

 protected:
  static constexpr int64_t tokens_ahead = 4, keys_ahead = 8;  // of prefetches

  // Rows of queries one after the other, from row r on.
  class Queries {
   public:
    Queries(const AttentionProblem& p, const AttentionTask& t, int64_t r)
        : p_(p), first_(t.kv_head * p.group), token_(t.q_begin + r / p.group), head_(first_ + r % p.group) {}
    void next() {
      if (++head_ == first_ + p_.group) {
        head_ = first_;
        ++token_;
      }
    }
    int64_t token() const { return token_; }
    float& lse() const { return p_.lse[head_ * p_.num_q + token_]; }
    // This row of x; the same head's row a few tokens on is fetched.
    T* row(const HeadRows& x, int64_t width) const {
      T* at = static_cast<T*>(x.data) + token_ * x.token + head_ * x.head;
      prefetch_row(at + tokens_ahead * x.token, width);
      return at;
    }

   private:
    const AttentionProblem& p_;
    const int64_t first_;
    int64_t token_, head_;
  };

  int64_t num_rows() const { return t_.num_queries() * p_.group; }
  Queries queries(int64_t r) const { return Queries(p_, t_, r); }

  T* key(const HeadRows& x, int64_t n) const {
    return static_cast<T*>(x.data) + (t_.k_begin + n) * x.token + t_.kv_head * x.head;
  }

  // visible[i]: how many of the keys [k0, k0 + n) row r0 + i may look at.
  void visible_keys(int64_t r0, int64_t m, int64_t k0, int64_t n, int64_t* visible) const {
    Queries row = queries(r0);
    for (int64_t i = 0; i < m; ++i, row.next()) {
      const int64_t some = t_.visible(row.token(), p_.causal) - k0;
      visible[i] = some < 0 ? 0 : some < n ? some : n;
    }
  }

  // The first row that may look at key k.
  int64_t first_row(int64_t k) const {
    return p_.causal && k >= t_.first_visible ? (k + 1 - t_.first_visible) * p_.group : 0;
  }

  void copy_queries(const HeadRows& x, int64_t width, float factor, int64_t r0, int64_t m, float* to) const {
    Queries row = queries(r0);
    for (int64_t i = 0; i < m; ++i, row.next(), to += Sizes::padded(width)) {
      copy_scaled<Vec>(row.row(x, width), factor, to, width);
    }
  }

  void copy_keys(const HeadRows& x, int64_t width, int64_t k0, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; ++i, to += Sizes::padded(width)) {
      prefetch_row(key(x, k0 + i + keys_ahead), width);
      copy_scaled<Vec>(key(x, k0 + i), 1.0f, to, width);
    }
  }

  // Panels whose columns are keys.
  void turn_keys(const HeadRows& x, int64_t width, int64_t k0, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; i += Sizes::cols, to += Sizes::cols * width) {
      const int64_t end = i + 2 * Sizes::cols < n ? i + 2 * Sizes::cols : n;
      for (int64_t j = i ? i + Sizes::cols : 0; j < end; ++j) prefetch_row(key(x, k0 + j), width);
      const Lines<T> keys = {key(x, k0 + i), x.token, nullptr, 1, nullptr};
      const int64_t num_keys = n - i < Sizes::cols ? n - i : Sizes::cols;
      pack_panel_transposed<Vec, Single>(keys, 0, num_keys, Sizes::cols, 0, width, to);
    }
  }

  static Panels turned(const float* data, int64_t width) { return {data, Sizes::cols, Sizes::cols * width}; }
  static Panels straight(const float* data, int64_t width) { return {data, Sizes::padded(width), Sizes::cols}; }

  // The row tile of a slice of m rows that row i is in ends before this row.
  static int64_t tile_end(int64_t i, int64_t m) {
    const int64_t end = i / Sizes::rows * Sizes::rows + Sizes::rows;
    return end < m ? end : m;
  }

  const AttentionProblem& p_;
  const AttentionTask& t_;
  const TailMask<Vec> tail_;
};

}  // namespace xt::cpu
