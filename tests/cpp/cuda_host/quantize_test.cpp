#include "xtuner/ops/quantize.h"

#include "cases.h"

namespace xt::test {
namespace {

constexpr DType formats[] = {DType::e4m3, DType::e5m2};

// Blocks of very different sizes, zeros, subnormal numbers, and now and then NaN and infinity.
Array wild(DType dtype, Shape shape, Rng& rng, int64_t count) {
  Array x(dtype, std::move(shape));
  std::normal_distribution<double> normal;
  const uint32_t salt = rng();
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t kind = (static_cast<uint32_t>(i / 128) * 2654435761u ^ salt) % 97;  // alike within a block
    x.set(i, kind == 0 ? 0.0 : std::ldexp(normal(rng), kind % 3 ? 0 : static_cast<int>(rng() % 24) - 20));
  }
  for (double odd : {std::nan(""), HUGE_VAL, -HUGE_VAL, 1e-40}) {
    if (count > 0 && rng() % 2) x.set(rng() % count, odd);
  }
  return x;
}

// The same values, bit for bit but for the bits of NaNs.
void require_same_values(const Array& got, const Array& cpu, const char* name) {
  if (got.bytes() == cpu.bytes()) return;
  for (int64_t i = 0; i < cpu.count(); ++i) {
    const bool same = std::isnan(cpu[i]) ? std::isnan(got[i]) : got[i] == cpu[i] && std::signbit(got[i]) == std::signbit(cpu[i]);
    require(same, name, "[", i, "] is ", got[i], ", on the CPU ", cpu[i]);
  }
}

void require_same_codes(const Array& got, const Array& cpu, const char* name) {
  for (int64_t i = 0; i < cpu.count(); ++i) {
    require(got.bytes()[i] == cpu.bytes()[i], name, "[", i, "] is ", +got.bytes()[i], ", on the CPU ", +cpu.bytes()[i]);
  }
}

void rows_case(Rng& rng, DType in, DType format, QuantizeParams params, int64_t used, int64_t tail, int64_t hidden,
               bool with_offsets) {
  const int64_t r = used + (with_offsets ? tail : 0), ld = row_scale_ld(r);
  const Array x = wild(in, {r, hidden}, rng, used * hidden);
  const std::vector<int64_t> at = {0, used / 2, used};
  const Tensor offsets = view(at, {3});
  Array q(format, {r, hidden}), scale(DType::f32, {hidden / 128, ld}), cpu_q = q, cpu_scale = scale;
  OnMachine d;
  const Tensor on_device = d.in("offsets", offsets);
  quantize_1x128(d.in_up_to("x", x.view(), used), with_offsets ? &on_device : nullptr, params, d.out("q", q.view()),
                 d.out("scale", scale.view()), d.stream());
  quantize_1x128(x.view(), with_offsets ? &offsets : nullptr, params, cpu_q.view(), cpu_scale.view(), {});
  require_same_codes(q, cpu_q, "q");
  require_same_values(scale, cpu_scale, "scale");
  require(d.fault() == no_fault, describe_fault(d.fault()));
}

void dequantize_case(Rng& rng, DType out, DType format, bool squares) {
  const int64_t rows = squares ? 256 : pick(rng, {0, 1, 9, 37}), hidden = pick(rng, {128, 384, 1152});
  const int64_t ld = row_scale_ld(rows) + 4;
  Array q(format, squares ? Shape{2, rows / 2, hidden} : Shape{rows, hidden});
  for (int64_t i = 0; i < q.count(); ++i) q.view().ptr<uint8_t>()[i] = static_cast<uint8_t>(rng());
  const Array scale = Array(DType::f32, squares ? Shape{2, rows / 256, hidden / 128} : Shape{hidden / 128, ld}).randomise(rng);
  Array got(out, squares ? Shape{2, rows / 2, hidden} : Shape{rows, hidden}), cpu = got;
  OnMachine d;
  dequantize(d.in("q", q.view()), d.in("scale", scale.view()), d.out("out", got.view()), d.stream());
  dequantize(q.view(), scale.view(), cpu.view(), {});
  require_same_values(got, cpu, "out");
}

}  // namespace

void quantize_squares_case(Rng& rng, DType in, DType format, QuantizeParams params, int64_t num_experts, int64_t n,
                           int64_t k) {
  const Array w = wild(in, {num_experts, n, k}, rng, num_experts * n * k);
  Array q(format, {num_experts, n, k}), qt(format, {num_experts, k, n}), scale(DType::f32, {num_experts, n / 128, k / 128});
  Array cpu_q = q, cpu_qt = qt, cpu_scale = scale;
  OnMachine d;
  quantize_128x128(d.in("w", w.view()), params, d.out("q", q.view()), d.out("qt", qt.view()),
                   d.out("scale", scale.view()), d.stream());
  quantize_128x128(w.view(), params, cpu_q.view(), cpu_qt.view(), cpu_scale.view(), {});
  require_same_codes(q, cpu_q, "q");
  require_same_codes(qt, cpu_qt, "qt");
  require_same_values(scale, cpu_scale, "scale");
}

void quantize_rowcol_case(Rng& rng, DType in, DType format, QuantizeParams params, const std::vector<int64_t>& rows,
                          int64_t tail, int64_t hidden) {
  const std::vector<int64_t> at = offsets_of(rows);
  const int64_t experts = static_cast<int64_t>(rows.size()), used = at.back(), r = used + tail;
  const int64_t p = padded_rows(r, experts);
  const Array x = wild(in, {r, hidden}, rng, used * hidden);
  const Tensor offsets = view(at, {experts + 1});
  Array q(format, {r, hidden}), scale(DType::f32, {hidden / 128, row_scale_ld(r)}), qt(format, {hidden, p}),
      scale_t(DType::f32, {p / 128, hidden});
  Array cpu_q = q, cpu_scale = scale, cpu_qt = qt, cpu_scale_t = scale_t;
  OnMachine d;
  quantize_rowcol(d.in_up_to("x", x.view(), used), d.in("offsets", offsets), params, d.out("q", q.view()),
                  d.out("scale", scale.view()), d.out("qt", qt.view()), d.out("scale_t", scale_t.view()), d.stream());
  quantize_rowcol(x.view(), offsets, params, cpu_q.view(), cpu_scale.view(), cpu_qt.view(), cpu_scale_t.view(), {});
  require_same_codes(q, cpu_q, "q");
  require_same_values(scale, cpu_scale, "scale");
  require_same_codes(qt, cpu_qt, "qt");
  require_same_values(scale_t, cpu_scale_t, "scale_t");
  require(d.fault() == no_fault, describe_fault(d.fault()));
}

namespace {

template <class Body>
void for_each_format(const Body& body) {
  int i = 0;
  for (DType in : {DType::f32, DType::bf16}) {
    for (DType format : formats) {
      const QuantizeParams params = {i % 2 == 1, i % 3 == 2 ? 0.5 : 1e-12};
      body(in, format, params);
      ++i;
    }
  }
}

TEST(CudaQuantize, RowsHaveTheCpusBits) {
  Rng rng(1);
  for_each_format([&](DType in, DType format, QuantizeParams params) {
    for (int64_t used : {0, 1, 2, 7, 8, 127, 128, 129}) {
      rows_case(rng, in, format, params, used, pick(rng, {0, 1, 6}), pick(rng, {128, 256, 768}), rng() % 2);
    }
    rows_case(rng, in, format, params, 3, 2, 1152, true);  // more than one tile a row
    rows_case(rng, in, format, params, 3, 2, 0, true);
  });
}

// Every code and every tie between codes, and the floats next to each, with both signs.
TEST(CudaQuantize, RoundsAroundAllTiesAsTheCpu) {
  for (DType format : formats) {
    std::vector<float> x;
    const float largest = format == DType::e4m3 ? 448.0f : 57344.0f;
    const auto add = [&](float v) {
      for (float s : {v, -v}) {
        if (x.size() % 128 == 0) x.push_back(largest);  // makes the block's scale 1
        x.push_back(s);
      }
    };
    for (int code = 0; fp8_value(format, code) < largest; ++code) {
      const float low = static_cast<float>(fp8_value(format, code));
      const float high = static_cast<float>(fp8_value(format, code + 1)), tie = (low + high) / 2;
      for (float v : {low, tie}) {
        for (float near : {v, std::nextafter(v, 0.0f), std::nextafter(v, high)}) add(near);
      }
    }
    add(1e-42f);
    x.resize((x.size() + 127) / 128 * 128, largest);
    const int64_t rows = static_cast<int64_t>(x.size()) / 128, ld = row_scale_ld(rows);
    Array q(format, {rows, 128}), scale(DType::f32, {1, ld});
    OnMachine d;
    quantize_1x128(d.in("x", view(x, {rows, 128})), nullptr, {}, d.out("q", q.view()), d.out("scale", scale.view()),
                   d.stream());
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(q.bytes()[i], fp8_nearest(format, x[i])) << x[i];
  }
}

TEST(CudaQuantize, SquaresHaveTheCpusBits) {
  Rng rng(2);
  for_each_format([&](DType in, DType format, QuantizeParams params) {
    quantize_squares_case(rng, in, format, params, pick(rng, {1, 2}), 256, 384);
    quantize_squares_case(rng, in, format, params, 0, 128, 128);
    quantize_squares_case(rng, in, format, params, 3, 0, 128);
  });
}

TEST(CudaQuantize, RowsAndColumnsHaveTheCpusBits) {
  Rng rng(3);
  for_each_schedule([&] {
    for_each_format([&](DType in, DType format, QuantizeParams params) {
      quantize_rowcol_case(rng, in, format, params, random_rows(rng, pick(rng, {1, 3})), pick(rng, {0, 1, 19}), 128);
    });
  });
  quantize_rowcol_case(rng, DType::f32, DType::e4m3, {}, {}, 5, 128);
  quantize_rowcol_case(rng, DType::f32, DType::e4m3, {}, {0, 0, 0}, 0, 128);
  quantize_rowcol_case(rng, DType::bf16, DType::e4m3, {}, {1, 0, 128, 256, 0}, 130, 1280);
  std::vector<int64_t> many(70, 0);  // more experts than a warp looks at together
  many[3] = 5, many[33] = 129, many[69] = 2;
  quantize_rowcol_case(rng, DType::bf16, DType::e5m2, {}, many, 1, 128);
}

TEST(CudaQuantize, BackHasTheCpusBits) {
  Rng rng(4);
  for_each_format([&](DType out, DType format, QuantizeParams) {
    for (int trial = 0; trial < 4; ++trial) dequantize_case(rng, out, format, trial % 2);
  });
}

TEST(CudaQuantize, NotesBadOffsetsAndStaysInBounds) {
  const auto fault_of = [](const std::vector<int64_t>& at) {
    const int64_t experts = static_cast<int64_t>(at.size()) - 1, p = padded_rows(4, experts);
    Rng rng(5);
    const Array x = Array(DType::bf16, {4, 128}).randomise(rng);
    Array q(DType::e4m3, {4, 128}), scale(DType::f32, {1, 4}), qt(DType::e4m3, {128, p}), scale_t(DType::f32, {p / 128, 128});
    OnMachine d;
    quantize_rowcol(d.in("x", x.view()), d.in("offsets", view(at, {experts + 1})), {}, d.out("q", q.view()),
                    d.out("scale", scale.view()), d.out("qt", qt.view()), d.out("scale_t", scale_t.view()), d.stream());
    return d.fault();
  };
  EXPECT_EQ(fault_of({0, 9}), fault_word(Fault::offsets, 9));
  EXPECT_EQ(fault_of({0, -1}), fault_word(Fault::offsets, -1));
  EXPECT_EQ(fault_of({0, 3, 2, 4}), fault_word(Fault::offsets_order, 1));
  EXPECT_EQ(describe_fault(fault_word(Fault::offsets_order, 1)), "offsets must ascend from 0, but those of expert 1 do not");
}

TEST(CudaQuantize, RefusesMisalignedCodes) {
  Array x(DType::f32, {1, 128}), q(DType::e4m3, {2, 128}), scale(DType::f32, {1, 4});
  OnMachine d;
  const Tensor shifted = d.out("q", Tensor(q.view().ptr<uint8_t>() + 4, DType::e4m3, {1, 128}));
  expect_error([&] { quantize_1x128(d.in("x", x.view()), nullptr, {}, shifted, d.out("scale", scale.view()), d.stream()); },
               "quantize_1x128: q must start at a multiple of 16 bytes, got float8_e4m3fn [1, 128] on cuda:1 starting 4");
}

}  // namespace
}  // namespace xt::test
