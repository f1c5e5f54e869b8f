#pragma once
#include "cpu/kernels.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/reduce_row.h"

namespace xt::cpu {

template <class Vec, class T>
void cross_entropy_typed(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* x = static_cast<T*>(a.logits) + t * a.vocab;
    const float most = largest<Vec>(x, a.vocab);
    const float total = sum_of_row<Vec>(a.vocab, [&](int64_t i, auto n) { return exp(load<Vec>(x + i, n) - Vec::all(most)); });
    const float logsumexp = most + __builtin_logf(total), at_label = value(x + a.labels[t]);
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
