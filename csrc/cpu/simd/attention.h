// Attention forward: blocks of keys, online softmax; scores are kept in units of log2 e.
#pragma once
#include "cpu/simd/attention_block.h"
#include "cpu/simd/exp2.h"

namespace xt::cpu {

// Scratch of one task, in floats.
template <class Vec>
struct AttentionScratch {
  using Sizes = AttentionSizes<Vec>;
  int64_t q, out, max, sum, k, v, scores, total;

  AttentionScratch(const AttentionProblem& p, int64_t rows) {
    q = 0;
    out = q + rows * Sizes::padded(p.width);
    max = out + rows * Sizes::padded(p.value_width);
    sum = max + (rows + 15) / 16 * 16;
    k = sum + (rows + 15) / 16 * 16;
    v = k + Sizes::keys * p.width;
    scores = v + Sizes::keys * Sizes::padded(p.value_width);
    total = scores + Sizes::slice * Sizes::keys_row;
  }
};

template <class Vec, class T>
class AttentionForward : AttentionRows<Vec, T> {
  using Base = AttentionRows<Vec, T>;
  using Sizes = AttentionSizes<Vec>;
  using Base::num_rows, Base::p_, Base::t_, Base::tail_;
  static constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

 public:
  AttentionForward(const AttentionProblem& p, const AttentionTask& t, float* scratch) : Base(p, t) {
    const AttentionScratch<Vec> at(p, num_rows());
    q_ = scratch + at.q;
    out_ = scratch + at.out;
    max_ = scratch + at.max;
    sum_ = scratch + at.sum;
    k_ = scratch + at.k;
    v_ = scratch + at.v;
    scores_ = scratch + at.scores;
  }

  void run() {
    const int64_t rows = num_rows(), out_row = Sizes::padded(p_.value_width);
    this->copy_queries(p_.q, p_.width, p_.scale * log2_e, 0, rows, q_);
    for (int64_t i = 0; i < rows * out_row; ++i) out_[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      max_[r] = -__builtin_inff();
      sum_[r] = 0;
    }
    const int64_t num_keys = t_.max_visible(p_.causal);
    for (int64_t k0 = 0; k0 < num_keys; k0 += Sizes::keys) {
      const int64_t n = num_keys - k0 < Sizes::keys ? num_keys - k0 : Sizes::keys;
      this->turn_keys(p_.k, p_.width, k0, n, k_);
      this->copy_keys(p_.v, p_.value_width, k0, n, v_);
      const int64_t first = this->first_row(k0) / Sizes::slice * Sizes::slice;
      for (int64_t r = first; r < rows; r += Sizes::slice) {
        attend(r, rows - r < Sizes::slice ? rows - r : Sizes::slice, k0, n);
      }
    }
    auto row = this->queries(0);
    for (int64_t r = 0; r < rows; ++r, row.next()) write(r, row);
  }

 private:
  // Rows [r0, r0 + m) look at keys [k0, k0 + n).
  void attend(int64_t r0, int64_t m, int64_t k0, int64_t n) {
    int64_t visible[Sizes::slice];
    this->visible_keys(r0, m, k0, n, visible);
    const int64_t row = Sizes::keys_row, q_row = Sizes::padded(p_.width), out_row = Sizes::padded(p_.value_width);
    const int64_t width = p_.width;
    multiply<Vec>(m, n, {q_ + r0 * q_row, q_row, 1}, Base::turned(k_, width), scores_, row, false,
                  [&](int64_t, int64_t i1, int64_t j) { return Extent{0, j < visible[i1 - 1] ? width : 0}; });
    for (int64_t i = 0; i < m; ++i) {
      softmax(r0 + i, scores_ + i * row, visible[i], visible[this->tile_end(i, m) - 1]);
    }
    multiply<Vec>(m, p_.value_width, {scores_, row, 1}, Base::straight(v_, p_.value_width), out_ + r0 * out_row,
                  out_row, true, [&](int64_t, int64_t i1, int64_t) { return Extent{0, visible[i1 - 1]}; });
  }

  // Turns n scores into weights and up to `end` into zeros, and brings the row's sums so far to the new maximum.
  XT_INLINE void softmax(int64_t r, float* s, int64_t n, int64_t end) {
    const int64_t rest = n % Vec::width, whole = n - rest + (rest ? Vec::width : 0);
    clear_vectors<Vec>(s, whole, end);
    if (n == 0) return;
    if (rest) {
      float* last = s + whole - Vec::width;
      tail_.select(rest, Vec::load(last), Vec::all(-__builtin_inff())).store(last);
    }
    const float old = max_[r], top = max_of(s, whole, old);
    const Vec shift = Vec::all(top);
    Vec sum0 = Vec::zero(), sum1 = sum0;
    int64_t i = 0;
    for (; i + 2 * Vec::width <= whole; i += 2 * Vec::width) {
      const Vec p0 = exp2(Vec::load(s + i) - shift), p1 = exp2(Vec::load(s + i + Vec::width) - shift);
      p0.store(s + i);
      p1.store(s + i + Vec::width);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
    }
    if (i < whole) {
      const Vec p = exp2(Vec::load(s + i) - shift);
      p.store(s + i);
      sum0 = sum0 + p;
    }
    float total = sum(sum0 + sum1);
    if (sum_[r] == 0) {
      max_[r] = top;
    } else if (top != old) {
      max_[r] = top;
      const float fade = first_of(exp2(Vec::all(old - top)));
      total += fade * sum_[r];
      scale_row(r, fade);
    } else {
      total += sum_[r];
    }
    sum_[r] = total;
  }

  static XT_INLINE float max_of(const float* s, int64_t n, float start) {
    Vec a = Vec::all(start), b = a;
    int64_t i = 0;
    for (; i + 2 * Vec::width <= n; i += 2 * Vec::width) {
      const Vec x = Vec::load(s + i), y = Vec::load(s + i + Vec::width);
      a = select_gt(x, a, x, a);
      b = select_gt(y, b, y, b);
    }
    if (i < n) {
      const Vec x = Vec::load(s + i);
      a = select_gt(x, a, x, a);
    }
    float lanes[Vec::width];
    select_gt(a, b, a, b).store(lanes);
    const auto larger = [](float x, float y) { return x > y ? x : y; };
    float t0 = lanes[0], t1 = lanes[1], t2 = lanes[2], t3 = lanes[3];
    for (int j = 4; j < Vec::width; j += 4) {
      t0 = larger(t0, lanes[j]);
      t1 = larger(t1, lanes[j + 1]);
      t2 = larger(t2, lanes[j + 2]);
      t3 = larger(t3, lanes[j + 3]);
    }
    return larger(larger(t0, t1), larger(t2, t3));
  }

  static XT_INLINE float first_of(Vec x) {
    float lanes[Vec::width];
    x.store(lanes);
    return lanes[0];
  }

  XT_INLINE void scale_row(int64_t r, float factor) {
    const int64_t row = Sizes::padded(p_.value_width);
    copy_scaled<Vec>(out_ + r * row, factor, out_ + r * row, p_.value_width);
  }

  void write(int64_t r, const typename Base::Queries& row) {
    const float sum = sum_[r];  // zero: no keys
    const float* from = out_ + r * Sizes::padded(p_.value_width);
    write_scaled<Vec>(from, sum == 0 ? 0 : 1 / sum, row.row(p_.out, p_.value_width), p_.value_width);
    row.lse() = sum == 0 ? -__builtin_inff() : ln_2 * max_[r] + __builtin_logf(sum);
  }

  float *q_, *out_, *max_, *sum_, *k_, *v_, *scores_;
};

template <class Vec>
int64_t attention_scratch(const AttentionProblem& p, int64_t rows) {
  return AttentionScratch<Vec>(p, rows).total;
}

template <class Vec>
void attention_task(const AttentionProblem& p, const AttentionTask& t, float* scratch) {
  p.dtype == DType::f32 ? AttentionForward<Vec, float>(p, t, scratch).run()
                        : AttentionForward<Vec, bf16_t>(p, t, scratch).run();
}

}  // namespace xt::cpu
