#pragma once
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd/each_vector.h"
#include "cpu/simd/exp.h"

namespace xt::cpu {

// The largest of n numbers; a NaN may be passed over.
template <class Vec, class T>
XT_INLINE float largest(const T* x, int64_t n) {
  float most = -__builtin_inff();
  int64_t i = 0;
  if (n >= Vec::width) {
    Vec lanes = Vec::load(x);
    for (i = Vec::width; i + Vec::width <= n; i += Vec::width) {
      const Vec v = Vec::load(x + i);
      lanes = select_gt(v, lanes, v, lanes);
    }
    float each[Vec::width];
    lanes.store(each);
    for (float v : each) most = v > most ? v : most;
  }
  for (; i < n; ++i) most = value(x + i) > most ? value(x + i) : most;
  return most;
}

template <class Vec, class T>
void cross_entropy_typed(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* x = static_cast<T*>(a.logits) + t * a.vocab;
    const float most = largest<Vec>(x, a.vocab);
    Vec total = Vec::zero();
    float rest = 0;
    each_vector<Vec>(a.vocab, [&](int64_t i, auto n) {
      const Vec e = exp(load<Vec>(x + i, n) - Vec::all(most));
      if constexpr (std::is_same_v<decltype(n), Whole>) {
        total = total + e;
      } else {  // what lies past the row must not count
        float each[Vec::width];
        e.store(each);
        for (int j = 0; j < n; ++j) rest += each[j];
      }
    });
    const float logsumexp = most + __builtin_logf(sum(total) + rest), at_label = value(x + a.labels[t]);
    a.losses[t] = a.weights[t] * (logsumexp - at_label);
    if (!a.gradient) continue;
    const Vec weight = Vec::all(a.weights[t]);
    each_vector<Vec>(a.vocab, [&](int64_t i, auto n) {
      store(weight * exp(load<Vec>(x + i, n) - Vec::all(logsumexp)), x + i, n);
    });
    const float slope = a.weights[t] * (__builtin_expf(at_label - logsumexp) - 1.0f);
    if constexpr (std::is_same_v<T, float>) {
      x[a.labels[t]] = slope;
    } else {
      x[a.labels[t]] = narrow(slope);
    }
  }
}

template <class Vec>
void cross_entropy_rows(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  a.dtype == DType::f32 ? cross_entropy_typed<Vec, float>(a, begin, end)
                        : cross_entropy_typed<Vec, bf16_t>(a, begin, end);
}

}  // namespace xt::cpu
