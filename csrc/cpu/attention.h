// Attention as the CPU kernels see it: documents cut into tasks, one key head at a time with all its query heads.
#pragma once
#include "xtuner/tensor.h"

namespace xt::cpu {

// Element (t, h, d) is data[t * token + h * head + d].
struct HeadRows {
  void* data;
  int64_t token, head;
};

struct AttentionProblem {
  DType dtype;
  int64_t group;               // query heads per key head
  int64_t width, value_width;  // D, Dv
  int64_t num_q;               // Tq, the row length of lse
  float scale;
  bool causal;
  HeadRows q, k, v, out;
  float* lse;               // [Hq, Tq]
  HeadRows dout, dq, dk, dv;  // backward only
};

// Queries [q_begin, q_end) against one document's keys [k_begin, k_begin + num_keys), in one key head.
struct AttentionTask {
  int64_t q_begin, q_end;
  int64_t k_begin, num_keys;
  int64_t first_visible;  // keys that query q_begin may look at
  int64_t kv_head;
  float* partial;  // backward: where to leave sums of [dk | dv] rows; null: they are complete, write dk and dv

  // The whole mask: query t sees the document's first visible(t) keys. It never falls as t grows.
  int64_t visible(int64_t t, bool causal) const { return causal ? first_visible + (t - q_begin) : num_keys; }
  int64_t max_visible(bool causal) const { return q_begin < q_end ? visible(q_end - 1, causal) : 0; }
  int64_t num_queries() const { return q_end - q_begin; }
};

}  // namespace xt::cpu
