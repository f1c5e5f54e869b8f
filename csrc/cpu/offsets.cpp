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

}  // namespace xt::cpu
