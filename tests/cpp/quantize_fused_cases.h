// What the tests of fused quantization share, on the CPU and on the double of a GPU.
#pragma once
#include "helpers.h"
#include "xtuner/ops/permute.h"
#include "xtuner/ops/quantize.h"
#include "xtuner/ops/route_map.h"
#include "xtuner/ops/swiglu.h"

namespace xt::test {

struct FusedCase {
  DType in, format;
  int64_t hidden;
  QuantizeParams params;

  explicit FusedCase(Rng& rng)
      : in(rng() % 2 ? DType::f32 : DType::bf16),
        format(rng() % 2 ? DType::e4m3 : DType::e5m2),
        hidden(pick(rng, {128, 384, 1152})) {
    params.power_of_two = rng() % 2;
  }
};

// A random routing, some of whose choices are dropped and whose experts start at multiples of 8, and its maps.
struct Maps {
  int64_t tokens, experts, k = 2, rows;
  std::vector<int32_t> row_of, src;
  std::vector<int64_t> offsets;

  Maps(Rng& rng, int64_t tokens, int64_t experts)
      : tokens(tokens), experts(experts), rows(2 * tokens + 8 * experts), row_of(2 * tokens), src(rows), offsets(experts + 1) {
    std::vector<int32_t> idx(2 * tokens), counts(experts);
    for (int32_t& e : idx) e = static_cast<int32_t>(rng() % (experts + 1)) - 1;
    route_map(view(idx, {tokens, k}), 8, view(counts, {experts}), view(offsets, {experts + 1}), row_of_view(), src_view(), {});
  }
  Tensor row_of_view() const { return view(row_of, {tokens, k}); }
  Tensor src_view() const { return view(src, {rows}); }
};

// The outputs.
struct RowColArrays {
  Array q, scale, qt, scale_t;

  RowColArrays(const FusedCase& c, int64_t rows, int64_t experts)
      : q(c.format, {rows, c.hidden}),
        scale(DType::f32, {c.hidden / 128, row_scale_ld(rows)}),
        qt(c.format, {c.hidden, padded_rows(rows, experts)}),
        scale_t(DType::f32, {padded_rows(rows, experts) / 128, c.hidden}) {}

  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const Array* a : {&q, &scale, &qt, &scale_t}) {
      const auto some = a->bytes();
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
};

}  // namespace xt::test
