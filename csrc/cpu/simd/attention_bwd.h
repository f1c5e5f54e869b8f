// Gradient of attention. The weights are computed again from the scores and the saved log-sum-exp, block by block:
//   P = exp(S - lse), dV += P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ += scale * dS K, dK += scale * dS^T Q.
#pragma once
#include "cpu/simd/attention_block.h"
#include "cpu/simd/exp2.h"

namespace xt::cpu {

// Scratch of one task, in floats. turned_k and turned_v have keys along their vectors, k has D.
template <class Vec>
struct AttentionBwdScratch {
  using Sizes = AttentionSizes<Vec>;
  int64_t dq, turned_k, turned_v, k, dk, dv, q, dout, weights, dscores, total;

  AttentionBwdScratch(const AttentionProblem& p, int64_t rows) {
    const int64_t row = Sizes::padded(p.width), value_row = Sizes::padded(p.value_width);
    dq = 0;
    turned_k = dq + rows * row;
    turned_v = turned_k + Sizes::keys * p.width;
    k = turned_v + Sizes::keys * p.value_width;
    dk = k + Sizes::keys * row;
    dv = dk + Sizes::keys * row;
    q = dv + Sizes::keys * value_row;
    dout = q + Sizes::slice * row;
    weights = dout + Sizes::slice * value_row;
    dscores = weights + Sizes::slice * Sizes::keys_row;
    total = dscores + Sizes::slice * Sizes::keys_row;
  }
};

template <class Vec, class T>
class AttentionBackward : AttentionRows<Vec, T> {
  using Base = AttentionRows<Vec, T>;
  using Sizes = AttentionSizes<Vec>;
  using Base::num_rows, Base::p_, Base::t_, Base::tail_;
  static constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

 public:
  AttentionBackward(const AttentionProblem& p, const AttentionTask& t, float* scratch)
      : Base(p, t), row_(Sizes::padded(p.width)), value_row_(Sizes::padded(p.value_width)) {
    const AttentionBwdScratch<Vec> at(p, num_rows());
    dq_ = scratch + at.dq;
    turned_k_ = scratch + at.turned_k;
    turned_v_ = scratch + at.turned_v;
    k_ = scratch + at.k;
    dk_ = scratch + at.dk;
    dv_ = scratch + at.dv;
    q_ = scratch + at.q;
    dout_ = scratch + at.dout;
    weights_ = scratch + at.weights;
    dscores_ = scratch + at.dscores;
  }

  void run() {
    const int64_t rows = num_rows(), num_keys = t_.max_visible(p_.causal);
    clear(dq_, rows * row_);
    for (int64_t k0 = 0; k0 < num_keys; k0 += Sizes::keys) {
      const int64_t n = num_keys - k0 < Sizes::keys ? num_keys - k0 : Sizes::keys;
      this->turn_keys(p_.k, p_.width, k0, n, turned_k_);
      this->turn_keys(p_.v, p_.value_width, k0, n, turned_v_);
      this->copy_keys(p_.k, p_.width, k0, n, k_);
      clear(dk_, n * row_);
      clear(dv_, n * value_row_);
      const int64_t first = this->first_row(k0) / Sizes::slice * Sizes::slice;
      for (int64_t r = first; r < rows; r += Sizes::slice) {
        differentiate(r, rows - r < Sizes::slice ? rows - r : Sizes::slice, k0, n);
      }
      for (int64_t i = 0; i < n; ++i) write_key(k0 + i, i);
    }
    auto row = this->queries(0);
    for (int64_t r = 0; r < rows; ++r, row.next()) {
      write_scaled<Vec>(dq_ + r * row_, p_.scale, row.row(p_.dq, p_.width), p_.width);
    }
  }

 private:
  static void clear(float* x, int64_t n) { __builtin_memset(x, 0, static_cast<size_t>(n) * sizeof(float)); }

  // What rows [r0, r0 + m) and keys [k0, k0 + n) do to each other.
  void differentiate(int64_t r0, int64_t m, int64_t k0, int64_t n) {
    int64_t visible[Sizes::slice];
    this->visible_keys(r0, m, k0, n, visible);
    this->copy_queries(p_.q, p_.width, p_.scale * log2_e, r0, m, q_);
    this->copy_queries(p_.dout, p_.value_width, 1.0f, r0, m, dout_);
    const int64_t width = p_.width, value_width = p_.value_width, row = Sizes::keys_row;
    multiply<Vec>(m, n, {q_, row_, 1}, Base::turned(turned_k_, width), weights_, row, false,
                  [&](int64_t, int64_t i1, int64_t j) { return Extent{0, j < visible[i1 - 1] ? width : 0}; });
    multiply<Vec>(m, n, {dout_, value_row_, 1}, Base::turned(turned_v_, value_width), dscores_, row, false,
                  [&](int64_t, int64_t i1, int64_t j) { return Extent{0, j < visible[i1 - 1] ? value_width : 0}; });
    auto query = this->queries(r0);
    for (int64_t i = 0; i < m; ++i, query.next()) {
      scores_to_gradients(query, i, visible[i], visible[this->tile_end(i, m) - 1]);
    }

    const auto seeing_rows = [&](int64_t i0, int64_t, int64_t) {
      const int64_t first = this->first_row(k0 + i0) - r0;
      return Extent{first < 0 ? 0 : first, m};
    };
    multiply<Vec>(n, value_width, {weights_, 1, row}, Base::straight(dout_, value_width), dv_, value_row_, true,
                  seeing_rows);
    multiply<Vec>(n, width, {dscores_, 1, row}, Base::straight(q_, width), dk_, row_, true, seeing_rows);
    multiply<Vec>(m, width, {dscores_, row, 1}, Base::straight(k_, width), dq_ + r0 * row_, row_, true,
                  [&](int64_t, int64_t i1, int64_t) { return Extent{0, visible[i1 - 1]}; });
  }

  // Row i of the slice: n visible scores become weights, and their gradients gradients of the scores. Zeros follow, to
  // `end` and to the end of the tile of keys.
  XT_INLINE void scores_to_gradients(const typename Base::Queries& query, int64_t i, int64_t n, int64_t end) {
    float *s = weights_ + i * Sizes::keys_row, *ds = dscores_ + i * Sizes::keys_row;
    const Vec lse = Vec::all(query.lse() * log2_e);
    const Vec delta = Vec::all(dot(dout_ + i * value_row_, query.row(p_.out, p_.value_width)));
    const int64_t rest = n % Vec::width, tile = (n + Sizes::rows - 1) / Sizes::rows * Sizes::rows;
    int64_t j = 0;
    for (; j < n - rest; j += Vec::width) {
      const Vec p = exp2(Vec::load(s + j) - lse);
      p.store(s + j);
      (p * (Vec::load(ds + j) - delta)).store(ds + j);
    }
    if (rest) {
      const Vec p = exp2(Vec::load(s + j) - lse), gradient = p * (Vec::load(ds + j) - delta);
      tail_.select(rest, p, Vec::zero()).store(s + j);
      tail_.select(rest, gradient, Vec::zero()).store(ds + j);
      j += Vec::width;
    }
    clear_vectors<Vec>(s, j, tile > end ? tile : end);
    clear_vectors<Vec>(ds, j, tile > end ? tile : end);
  }

  XT_INLINE float dot(const float* a, const T* b) const {
    Vec sum0 = Vec::zero();
    int64_t i = 0;
    for (; i + Vec::width <= p_.value_width; i += Vec::width) sum0 = fma(Vec::load(a + i), Vec::load(b + i), sum0);
    if (i < p_.value_width) {
      const int rest = static_cast<int>(p_.value_width - i);
      sum0 = fma(Vec::load(a + i, rest), Vec::load(b + i, rest), sum0);
    }
    return sum(sum0);
  }

  // q_ was in units of log2 e / scale: dS^T q_ is log2 e times dk.
  void write_key(int64_t key, int64_t i) {
    const float *dk = dk_ + i * row_, *dv = dv_ + i * value_row_;
    if (t_.partial) {
      float* to = t_.partial + key * (p_.width + p_.value_width);
      write_scaled<Vec>(dk, ln_2, to, p_.width);
      write_scaled<Vec>(dv, 1.0f, to + p_.width, p_.value_width);
    } else {
      write_scaled<Vec>(dk, ln_2, this->key(p_.dk, key), p_.width);
      write_scaled<Vec>(dv, 1.0f, this->key(p_.dv, key), p_.value_width);
    }
  }

  const int64_t row_, value_row_;
  float *dq_, *turned_k_, *turned_v_, *k_, *dk_, *dv_, *q_, *dout_, *weights_, *dscores_;
};

template <class Vec>
int64_t attention_bwd_scratch(const AttentionProblem& p, int64_t rows) {
  return AttentionBwdScratch<Vec>(p, rows).total;
}

template <class Vec>
void attention_bwd_task(const AttentionProblem& p, const AttentionTask& t, float* scratch) {
  p.dtype == DType::f32 ? AttentionBackward<Vec, float>(p, t, scratch).run()
                        : AttentionBackward<Vec, bf16_t>(p, t, scratch).run();
}

}  // namespace xt::cpu
