#include "cpu/cpu.h"

namespace xt::cpu {

int64_t used_rows(const char* op, const Tensor& offsets, int64_t num_rows) {
  const int64_t* at = offsets.ptr<int64_t>();
  const int64_t last = offsets.shape[0] - 1;
  if (at[0] != 0) fail(op, ": offsets[0] must be 0, got ", at[0]);
  for (int64_t e = 0; e < last; ++e) {
    if (at[e + 1] < at[e]) fail(op, ": offsets must not decrease, but offsets[", e, "]=", at[e], " > offsets[", e + 1, "]=", at[e + 1]);
  }
  if (at[last] > num_rows) fail(op, ": offsets[", last, "]=", at[last], " exceeds the ", num_rows, " rows there are");
  return at[last];
}

void check_gather(const char* op, const RowGather& gather, int64_t used, int64_t num_tokens) {
  if (!gather.src) return;
  const int32_t* src = gather.src->ptr<int32_t>();
  const int64_t choices = num_tokens * gather.num_experts_per_tok;
  for (int64_t r = 0; r < used; ++r) {
    if (src[r] < -1 || src[r] >= choices) fail(op, ": src[", r, "] must be in [-1, T*K=", choices, "), got ", src[r]);
  }
}

}  // namespace xt::cpu
