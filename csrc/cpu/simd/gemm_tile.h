// One tile of a matrix product: pack V once, stream Q past it, keep sums in registers, L2 scratch or the output itself.
#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/gemm_epilogue.h"
#include "cpu/simd/gemm_pack.h"

namespace xt::cpu {

// Scales of lines [first, first + n) in block b of k.
XT_INLINE void scales_of(const GemmScale& s, int64_t first, int64_t n, int64_t b, float* to) {
  const float* data = s.data + b * s.block;
  for (int64_t i = 0; i < n && s.lines == 1; ++i) to[i] = data[(first + i) * s.line];
  for (int64_t i = 0; i < n && s.lines > 1;) {
    const int64_t group = (first + i) / s.lines, end = (group + 1) * s.lines - first;
    for (; i < n && i < end; ++i) to[i] = data[group * s.line];
  }
}

// to[i, j] (+)= block[i, j] * (q_scale[i] * v_scale[j]), by whole vectors.
template <class Vec>
XT_INLINE void promote(const float* block, int64_t m, int64_t n, const float* q_scale, const float* v_scale, float* to,
                       int64_t to_row, Store store) {
  for (int64_t i = 0; i < m; ++i, block += 2 * Vec::width, to += to_row) {
    for (int64_t j = 0; j < n; j += Vec::width) {
      const Vec factor = Vec::all(q_scale[i]) * Vec::load(v_scale + j), x = Vec::load(block + j);
      switch (store) {
        case Store::set: (x * factor).store(to + j); break;
        case Store::add: fma(x, factor, Vec::load(to + j)).store(to + j); break;
        case Store::stream: (x * factor).stream(to + j); break;
      }
    }
  }
}

template <class Vec, class Unit>
class GemmTileRunner {
  static constexpr int64_t rows = Vec::tile_rows, most_rows = Vec::thin_tile_rows, cols = 2 * Vec::width;
  static constexpr int64_t most_slice = 96;  // plan_.slice at most

 public:
  GemmTileRunner(const GemmTile& t, float* scratch)
      : t_(t),
        p_(*t.problem),
        plan_(*t.plan),
        blocks_(p_, Unit::elements),
        turned_(p_.out.v_stride != 1),
        num_halves_(p_.epilogue.half ? 2 : 1),
        num_panels_((t.v1 - t.v0 + cols - 1) / cols),
        v_halves_(turned_ ? 1 : num_halves_),
        sums_row_(v_halves_ * num_panels_ * cols),
        packed_v_(scratch),
        packed_q_(scratch + plan_.packed_v),
        sums_(scratch + plan_.packed_v + plan_.packed_q),
        direct_(sums_in_output(p_.out)) {}

  void run() {
    const bool waiting = plan_.blocks_per_pass < blocks_.count;  // with several passes over k the sums of all slices wait in scratch
    const int64_t q_halves = turned_ ? num_halves_ : 1;
    for (int64_t b0 = 0; b0 < blocks_.count; b0 += plan_.blocks_per_pass) {
      const int64_t b1 = min(blocks_.count, b0 + plan_.blocks_per_pass);
      for (int64_t b = b0; b < b1; ++b) pack_v(b, packed_block(b - b0));
      for (int64_t q = t_.q0; q < t_.q1; q += plan_.slice) {
        const int64_t n = min(plan_.slice, t_.q1 - q);
        for (int64_t half = 0; half < q_halves; ++half) {
          float* sums = waiting ? sums_ + (half * (t_.q1 - t_.q0) + q - t_.q0) * sums_row_ : sums_;
          const int64_t from = q + half * p_.epilogue.half;
          multiply_slice(from, n, b0, b1, sums);
          if (b1 == blocks_.count) finish(from, n, sums);
        }
        if (b1 == blocks_.count && p_.epilogue.half) activate<Vec>(p_, t_, q, n);
        if (b1 == blocks_.count && p_.epilogue.gate_up) dswiglu<Vec>(p_, t_, q, n);
      }
    }
    if (streams()) Vec::fence();
  }

 private:
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  float* packed_block(int64_t i) const { return packed_v_ + i * sums_row_ * blocks_.length; }
  int64_t k0(int64_t b) const { return b * blocks_.length * Unit::elements; }
  int64_t k1(int64_t b) const { return min(p_.num_k, k0(b + 1)); }
  int64_t units(int64_t b) const { return (k1(b) - k0(b) + Unit::elements - 1) / Unit::elements; }

  // The output is written only once, and by whole vectors.
  bool streams() const {
    const int64_t vector = Vec::width * size_of(p_.out.dtype);
    return t_.stream && (!direct_ || blocks_.count == 1) && !turned_ && !p_.out.accumulate && !p_.epilogue.bias &&
           !p_.epilogue.half && !p_.epilogue.gate_up && p_.out.q_stride % Vec::width == 0 &&
           reinterpret_cast<uintptr_t>(p_.out.data) % vector == 0;
  }

  template <class T>
  static Lines<T> lines(const GemmSide& s) {
    return {static_cast<const T*>(s.data), s.row == 1 ? s.col : s.row, s.index, s.divisor, static_cast<const T*>(s.zeros)};
  }

  void pack_v(int64_t b, float* to) const {
    for (int64_t half = 0; half < v_halves_; ++half, to += num_panels_ * cols * blocks_.length) {
      const int64_t v0 = t_.v0 + half * p_.epilogue.half;
      switch (p_.v.dtype) {
        case DType::e4m3: pack_v_fp8<e4m3_t>(v0, b, to); break;
        case DType::e5m2: pack_v_fp8<e5m2_t>(v0, b, to); break;
        case DType::bf16: pack_v_typed<bf16_t>(v0, b, to); break;
        default:
          if constexpr (Unit::elements == 1) pack_v_typed<float>(v0, b, to);
      }
    }
  }

  template <class F>
  void pack_v_fp8(int64_t v0, int64_t b, float* to) const {
    const int64_t num_v = t_.v1 - t_.v0, panel = cols * blocks_.length;
    for (int64_t v = 0; v < num_v; v += cols, to += panel) {
      const int64_t n = min(cols, num_v - v);
      pack_panel_fp8<Vec, Unit>(lines<F>(p_.v), v0 + v, n, columns_read(n), k0(b), k1(b), to);
    }
  }

  template <class T>
  void pack_v_typed(int64_t v0, int64_t b, float* to) const {
    const int64_t num_v = t_.v1 - t_.v0, panel = cols * blocks_.length;
    const Lines<T> from = lines<T>(p_.v);
    if (p_.v.row == 1) return pack_panels_copied<Vec, Unit>(from, v0, num_v, k0(b), k1(b), to, panel);
    for (int64_t v = 0; v < num_v; v += cols, to += panel) {
      const int64_t n = min(cols, num_v - v);
      pack_panel_transposed<Vec, Unit>(from, v0 + v, n, columns_read(n), k0(b), k1(b), to);
    }
  }

  // Where the innermost loop finds Q: groups of `rows` rows, `group` from one to the next; with `group` 0 rows lie
  // evenly, and it may take any number of them.
  template <class T>
  struct QView {
    const T* data;
    int64_t row, col, group, block_length;
    const T* at(int64_t i, int64_t block) const {
      return data + (group ? i / rows * group : i * row) + block * block_length * col;
    }
  };

  QView<float> view_q(int64_t q, int64_t n, int64_t b0, int64_t b1) const {
    if (reads_q_in_place()) return rows_in_place<float, Unit::elements>(q, b0);
    const int64_t from = k0(b0), to = k1(b1 - 1);
    switch (p_.q.dtype) {
      case DType::e4m3: return pack_q_rows<e4m3_t>(q, n, from, to);
      case DType::e5m2: return pack_q_rows<e5m2_t>(q, n, from, to);
      case DType::bf16: return pack_q<bf16_t>(q, n, from, to);
      default: break;
    }
    if constexpr (Unit::elements == 1) return pack_q<float>(q, n, from, to);
    return {};
  }

  // Units along k that lie in memory as the innermost loop wants them need no copy.
  bool reads_q_in_place() const {
    if (p_.q.col != 1 || p_.q.index) return false;
    if constexpr (Unit::elements == 1) return p_.q.dtype == DType::f32;
    return p_.q.dtype == DType::bf16 && p_.q.row % 2 == 0 && reinterpret_cast<uintptr_t>(p_.q.data) % 4 == 0;
  }

  // So do bfloat16 that the innermost loop widens.
  bool widens_in_place() const {
    return p_.q.dtype == DType::bf16 && p_.q.col == 1 && !p_.q.index;
  }

  template <class T, int elements>
  QView<T> rows_in_place(int64_t q, int64_t b0) const {
    const int64_t row = p_.q.row / elements;
    return {static_cast<const T*>(p_.q.data) + q * row + b0 * blocks_.length, row, 1, 0, blocks_.length};
  }

  template <class T>
  QView<float> pack_q_rows(int64_t q, int64_t n, int64_t from, int64_t to) const {
    pack_rows<Vec, Unit>(lines<T>(p_.q), q, n, from, to, packed_q_, plan_.packed_q_row);
    return {packed_q_, plan_.packed_q_row, 1, 0, blocks_.length};
  }

  template <class T>
  QView<float> pack_q(int64_t q, int64_t n, int64_t from, int64_t to) const {
    if (p_.q.col == 1) return pack_q_rows<T>(q, n, from, to);
    pack_groups<Vec, Unit>(lines<T>(p_.q), q, n, from, to, packed_q_);
    return {packed_q_, 1, rows, group_size<Vec>((to - from + Unit::elements - 1) / Unit::elements), blocks_.length};
  }

  // By the innermost loop, for a panel with n columns.
  static int64_t columns_read(int64_t n) { return n > Vec::width ? cols : n > Vec::Half::width ? Vec::width : Vec::Half::width; }

  template <class T>
  static MicroFn<T> micro_of(int64_t n, int64_t m) {
    if (n > Vec::width) return micro_for<Vec, Unit, T, 2>(m);
    if (n > Vec::Half::width) return micro_for<Vec, Unit, T, 1>(m);
    return micro_for<typename Vec::Half, Unit, T, 1>(m);
  }

  // How many of the next `left` rows of Q the innermost loop takes, for a panel with n columns.
  template <class T>
  static int64_t rows_at_once(const QView<T>& view, int64_t left, int64_t n) {
    if (view.group) return min(left, rows);
    int64_t most = n > Vec::width ? rows : most_rows;
    // Lines a page apart fall into the same set of the first cache: no more of them at a time than it has ways.
    if (view.row * int64_t{sizeof(T)} % 4096 == 0) most = min(most, 8);
    return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;  // few sums alone would wait for each other
  }

  void multiply_slice(int64_t q, int64_t n, int64_t b0, int64_t b1, float* sums) const {
    if constexpr (Unit::elements == 1) {
      if (widens_in_place()) return multiply_blocks(q, n, b0, b1, rows_in_place<bf16_t, 1>(q, b0), sums);
    }
    multiply_blocks(q, n, b0, b1, view_q(q, n, b0, b1), sums);
  }

  template <class T>
  void multiply_blocks(int64_t q, int64_t n, int64_t b0, int64_t b1, const QView<T>& view, float* sums) const {
    for (int64_t b = b0; b < b1; ++b) multiply(q, n, b, b - b0, view, sums);
  }

  // Block b of k, the one in place `nth` of what is packed.
  template <class T>
  void multiply(int64_t q, int64_t n, int64_t b, int64_t nth, const QView<T>& view, float* sums) const {
    const float* v_block = packed_block(nth);
    const int64_t row = direct_ ? p_.out.q_stride : sums_row_;
    const bool add = b > 0 || (direct_ && p_.out.accumulate);
    float q_scale[most_slice], v_scale[cols] = {};
    if (p_.q.scale.data) scales_of(p_.q.scale, q, n, b, q_scale);
    const Store store = add ? Store::add : direct_ && streams() ? Store::stream : Store::set;
    for (int64_t half = 0; half < v_halves_; ++half) {
      float* to = direct_ ? static_cast<float*>(p_.out.data) + q * row + t_.v0 + half * p_.epilogue.half
                          : sums + half * num_panels_ * cols;
      for (int64_t v = t_.v0; v < t_.v1; v += cols, v_block += cols * blocks_.length, to += cols) {
        const int64_t width = min(cols, t_.v1 - v);
        if (p_.v.scale.data) scales_of(p_.v.scale, v, width, b, v_scale);
        for (int64_t i = 0, m; i < n; i += m) {
          m = rows_at_once(view, n - i, width);
          const T* from = view.at(i, nth);
          const MicroFn<T> fn = micro_of<T>(width, m);
          if (p_.q.scale.data) {
            float block[most_rows * cols];
            fn(units(b), from, view.row, view.col, v_block, cols, block, cols, Store::set);
            promote<Vec>(block, m, width, q_scale + i, v_scale, to + i * row, row, store);
          } else if (!direct_ || width == cols) {
            fn(units(b), from, view.row, view.col, v_block, cols, to + i * row, row, store);
          } else {  // storing whole vectors would run over the output's edge
            float edge[most_rows * cols];
            fn(units(b), from, view.row, view.col, v_block, cols, edge, cols, Store::set);
            for (int64_t r = 0; r < m; ++r) {
              float* o = to + (i + r) * row;
              for (int64_t j = 0; j < width; ++j) o[j] = add ? o[j] + edge[r * cols + j] : edge[r * cols + j];
            }
          }
        }
      }
    }
  }

  // Rows [q, q + n) have their sums: bring them to the output.
  void finish(int64_t q, int64_t n, const float* sums) const {
    if (direct_) {
      if (p_.epilogue.bias) add_bias<Vec>(p_, t_, q, n);
    } else if (p_.out.dtype == DType::f32) {
      write_sums<Vec, float>(p_, t_, q, n, sums, sums_row_, num_panels_ * cols);
    } else if (streams()) {
      stream_sums<Vec, bf16_t>(p_, t_, q, n, sums, sums_row_);
    } else {
      write_sums<Vec, bf16_t>(p_, t_, q, n, sums, sums_row_, num_panels_ * cols);
    }
  }

  const GemmTile& t_;
  const GemmProblem& p_;
  const GemmPlan& plan_;
  const KBlocks blocks_;
  const bool turned_;         // the output's rows run along q
  const int64_t num_halves_;  // 2: gate and up
  const int64_t num_panels_;  // of one half
  const int64_t v_halves_;    // halves side by side along v
  const int64_t sums_row_;
  float* const packed_v_;
  float* const packed_q_;
  float* const sums_;
  const bool direct_;
};

template <class Vec, class Unit>
void gemm_tile(const GemmTile& tile, float* scratch) {
  GemmTileRunner<Vec, Unit>(tile, scratch).run();
}

}  // namespace xt::cpu
