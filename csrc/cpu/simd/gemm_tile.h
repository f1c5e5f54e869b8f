// One tile of a matrix product: pack V once, stream Q past it, keep sums in registers, L2 scratch or the output itself.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/gemm_micro.h"
#include "cpu/simd/gemm_pack.h"

namespace xt::cpu {

template <class Vec>
class GemmTileRunner {
  static constexpr int64_t rows = Vec::tile_rows, cols = 2 * Vec::width;
  static constexpr int64_t slice = 96 / rows * rows;  // rows of Q worked on at a time; they stay in L2

 public:
  GemmTileRunner(const GemmTile& t, const GemmScratchSize& size, float* scratch)
      : t_(t),
        p_(*t.problem),
        blocks_(p_.num_k),
        num_panels_((t.v1 - t.v0 + cols - 1) / cols),
        packed_v_(scratch),
        packed_q_(scratch + size.packed_v),
        sums_(scratch + size.packed_v + size.packed_q),
        direct_(sums_in_output(p_.out)) {}

  void run() {
    const int64_t per_pass = k_blocks_per_pass(blocks_, num_panels_ * cols);
    for (int64_t b0 = 0; b0 < blocks_.count; b0 += per_pass) {
      const int64_t b1 = b0 + per_pass < blocks_.count ? b0 + per_pass : blocks_.count;
      for (int64_t b = b0; b < b1; ++b) pack_v(b, packed_block(b - b0));
      for (int64_t q = t_.q0; q < t_.q1; q += slice) {
        const int64_t n = q + slice < t_.q1 ? slice : t_.q1 - q;
        // With several passes over k the sums of all slices wait in scratch; with one, a single slice's do.
        float* sums = per_pass < blocks_.count ? sums_ + (q - t_.q0) * num_panels_ * cols : sums_;
        for (int64_t b = b0; b < b1; ++b) multiply(q, n, b, packed_block(b - b0), sums);
        if (!direct_ && b1 == blocks_.count) write(q, n, sums);
      }
    }
  }

 private:
  float* packed_block(int64_t i) const { return packed_v_ + i * num_panels_ * cols * blocks_.length; }
  int64_t begin(int64_t b) const { return b * blocks_.length; }
  int64_t length(int64_t b) const {
    return begin(b) + blocks_.length < p_.num_k ? blocks_.length : p_.num_k - begin(b);
  }

  template <class T>
  static const T* at(const GemmSide& side, int64_t i, int64_t k) {
    return static_cast<const T*>(side.data) + i * side.row + k * side.col;
  }

  void pack_v(int64_t b, float* to) const {
    p_.v.dtype == DType::f32 ? pack_v_typed<float>(b, to) : pack_v_typed<bf16_t>(b, to);
  }

  template <class T>
  void pack_v_typed(int64_t b, float* to) const {
    const GemmSide& s = p_.v;
    const int64_t num_v = t_.v1 - t_.v0, panel = cols * blocks_.length;
    if (s.row == 1) return pack_panels_copied<Vec>(at<T>(s, t_.v0, begin(b)), s.col, num_v, length(b), to, panel);
    for (int64_t v = 0; v < num_v; v += cols, to += panel) {
      const int64_t n = num_v - v < cols ? num_v - v : cols;
      pack_panel_transposed<Vec>(at<T>(s, t_.v0 + v, begin(b)), s.row, n, length(b), to);
    }
  }

  // Where the innermost loop finds rows [q, q + n) of Q in k block b.
  struct QView {
    const float* data;
    int64_t row, col, group;  // group: from one tile_rows group to the next
  };

  QView view_q(int64_t q, int64_t n, int64_t b) const {
    const GemmSide& s = p_.q;
    const int64_t num_k = length(b);
    if (s.col == 1) {
      if (s.dtype == DType::f32) return {at<float>(s, q, begin(b)), s.row, 1, rows * s.row};
      const int64_t row = KBlocks::longest + 16;  // not a power of two: rows must not fight for the same cache sets
      pack_rows<Vec>(at<bf16_t>(s, q, begin(b)), s.row, n, num_k, packed_q_, row);
      return {packed_q_, row, 1, rows * row};
    }
    if (s.dtype == DType::f32) {
      pack_groups<Vec>(at<float>(s, q, begin(b)), s.col, n, num_k, packed_q_);
    } else {
      pack_groups<Vec>(at<bf16_t>(s, q, begin(b)), s.col, n, num_k, packed_q_);
    }
    return {packed_q_, 1, rows, rows * num_k};
  }

  void multiply(int64_t q, int64_t n, int64_t b, const float* v_block, float* sums) const {
    const QView view = view_q(q, n, b);
    const int64_t num_k = length(b);
    const bool add = b > 0 || (direct_ && p_.out.accumulate);
    const int64_t row = direct_ ? p_.out.q_stride : num_panels_ * cols;
    float* to = direct_ ? static_cast<float*>(p_.out.data) + q * row + t_.v0 : sums;
    for (int64_t panel = 0; panel < num_panels_; ++panel, v_block += cols * blocks_.length, to += cols) {
      const int64_t width = t_.v1 - t_.v0 - panel * cols;
      const bool cut = direct_ && width < cols;  // storing whole vectors would run over the output's edge
      for (int64_t i = 0; i < n; i += rows) {
        const int64_t m = n - i < rows ? n - i : rows;
        const MicroFn fn = width > Vec::width ? micro_for<Vec, 2>(m) : micro_for<Vec, 1>(m);
        const float* from = view.data + i / rows * view.group;
        if (!cut) {
          fn(num_k, from, view.row, view.col, v_block, cols, to + i * row, row, add);
        } else {
          float edge[rows * cols];
          fn(num_k, from, view.row, view.col, v_block, cols, edge, cols, false);
          for (int64_t r = 0; r < m; ++r) {
            float* o = to + (i + r) * row;
            for (int64_t j = 0; j < width; ++j) o[j] = add ? o[j] + edge[r * cols + j] : edge[r * cols + j];
          }
        }
      }
    }
  }

  void write(int64_t q, int64_t n, const float* sums) const {
    if (p_.out.dtype == DType::f32) {
      p_.out.v_stride == 1 ? write_rows<float>(q, n, sums) : write_transposed<float>(q, n, sums);
    } else {
      p_.out.v_stride == 1 ? write_rows<bf16_t>(q, n, sums) : write_transposed<bf16_t>(q, n, sums);
    }
  }

  template <class T>
  void put(const float* from, T* to, int64_t n) const {
    int64_t i = 0;
    for (; i < n; i += Vec::width) {
      const int rest = n - i < Vec::width ? static_cast<int>(n - i) : 0;
      Vec x = rest ? Vec::load(from + i, rest) : Vec::load(from + i);
      if (p_.out.accumulate) x = (rest ? Vec::load(to + i, rest) : Vec::load(to + i)) + x;
      rest ? x.store(to + i, rest) : x.store(to + i);
    }
  }

  template <class T>
  void write_rows(int64_t q, int64_t n, const float* sums) const {
    T* out = static_cast<T*>(p_.out.data) + q * p_.out.q_stride + t_.v0;
    for (int64_t i = 0; i < n; ++i) put(sums + i * num_panels_ * cols, out + i * p_.out.q_stride, t_.v1 - t_.v0);
  }

  // Output rows run along q: turn `block` columns of the sums at a time.
  template <class T>
  void write_transposed(int64_t q, int64_t n, const float* sums) const {
    constexpr int64_t block = Vec::block;
    float turned[block * slice];
    const int64_t sums_row = num_panels_ * cols, num_v = t_.v1 - t_.v0;
    T* out = static_cast<T*>(p_.out.data) + t_.v0 * p_.out.v_stride + q;
    for (int64_t v = 0; v < num_v; v += block) {
      int64_t i = 0;
      for (; i + block <= n; i += block) Vec::transpose(sums + i * sums_row + v, sums_row, turned + i, slice);
      for (; i < n; ++i) {
        for (int64_t j = 0; j < block; ++j) turned[j * slice + i] = sums[i * sums_row + v + j];
      }
      for (int64_t j = 0; j < block && v + j < num_v; ++j) put(turned + j * slice, out + (v + j) * p_.out.v_stride, n);
    }
  }

  const GemmTile& t_;
  const GemmProblem& p_;
  const KBlocks blocks_;
  const int64_t num_panels_;
  float* const packed_v_;
  float* const packed_q_;
  float* const sums_;
  const bool direct_;
};

template <class Vec>
void gemm_tile(const GemmTile& tile, const GemmScratchSize& size, float* scratch) {
  GemmTileRunner<Vec>(tile, size, scratch).run();
}

}  // namespace xt::cpu
