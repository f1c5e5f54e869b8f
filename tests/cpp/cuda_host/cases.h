// What one run of an op on the machine must show, as functions that the tests of the op and of its barriers share. They
// throw Mismatch (or the machine throws Violation) so that the barriers' test can expect a failure.
#pragma once
#include "device.h"
#include "xtuner/ops/quantize.h"

namespace xt::test {

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw Mismatch(message.str());
}

template <class T>
void require_same(const std::vector<T>& got, const std::vector<T>& wanted, const char* name) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    require(got[i] == wanted[i], name, "[", i, "] is ", +got[i], ", on the CPU ", +wanted[i]);
  }
}

// One random routing on the machine and on the CPU, bit for bit.
void route_map_case(Rng& rng, DType index, int64_t tokens, int64_t choices, int64_t num_experts, int64_t align);

// quantize_128x128 and quantize_rowcol of random numbers, on the machine and on the CPU, bit for bit.
void quantize_squares_case(Rng& rng, DType in, DType format, QuantizeParams params, int64_t num_experts, int64_t n,
                           int64_t k);
void quantize_rowcol_case(Rng& rng, DType in, DType format, QuantizeParams params, const std::vector<int64_t>& rows,
                          int64_t tail, int64_t hidden);

// Steps of a layer on several ranks, forward and backward, with the results of one rank that has all experts.
void ep_case(Rng& rng, int world, DType dtype, int64_t hidden, int steps);

}  // namespace xt::test
