#include "xtuner/ops/quantize.h"

#include "cpu/cache.h"
#include "helpers.h"

namespace xt::test {
namespace {

constexpr int64_t block = 128;
constexpr DType formats[] = {DType::e4m3, DType::e5m2};

float largest(DType format) { return format == DType::e4m3 ? 448.0f : 57344.0f; }

// What the header promises for a block of numbers: its scale, then its codes.
float expected_scale(const std::vector<double>& x, DType format, QuantizeParams params) {
  float maximum = static_cast<float>(params.eps);
  for (double v : x) {
    if (std::isnan(v) || std::fabs(v) > maximum) maximum = std::fabs(static_cast<float>(v));
    if (std::isnan(maximum)) break;
  }
  float scale = maximum / largest(format);
  if (params.power_of_two && std::isfinite(scale)) {
    int exponent;
    scale = std::ldexp(1.0f, std::frexp(scale, &exponent) == 0.5f ? exponent - 1 : exponent);
  }
  return scale;
}

int expected_code(double x, DType format, float scale) {
  return std::isfinite(scale) ? fp8_nearest(format, static_cast<float>(x) * (1.0f / scale)) : 0x7f;
}

void expect_block(const std::vector<double>& x, DType format, QuantizeParams params, double scale,
                  const std::function<int(size_t)>& code) {
  const float wanted = expected_scale(x, format, params);
  ASSERT_TRUE(scale == wanted || (std::isnan(scale) && std::isnan(wanted))) << scale << " != " << wanted;
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(code(i), expected_code(x[i], format, wanted)) << x[i] << " at " << i;
}

// Numbers of very different sizes; now and then a zero block, NaN or infinity.
Array wild(DType dtype, Shape shape, Rng& rng, int64_t count = -1) {
  Array x(dtype, std::move(shape));
  std::normal_distribution<double> normal;
  const int64_t n = count < 0 ? x.count() : count;
  for (int64_t i = 0; i < n; ++i) {
    const int kind = static_cast<int>(i / block * 2654435761u % 97);  // alike within a block
    x.set(i, kind == 0 ? 0.0 : std::ldexp(normal(rng), kind % 3 ? 0 : static_cast<int>(rng() % 24) - 20));
  }
  if (n > 0 && rng() % 2) x.set(rng() % n, std::nan(""));
  if (n > 0 && rng() % 2) x.set(rng() % n, rng() % 2 ? HUGE_VAL : -HUGE_VAL);
  return x;
}

TEST(Fp8, WideningOfAllCodes) {
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
  const std::vector<float> scale = {1.0f, 1.0f};
  std::vector<float> out(256);
  for_each_isa([&] {
    for (DType format : formats) {
      dequantize(Tensor(codes.data(), format, {1, 256}), view(scale, {2, 1}), view(out, {1, 256}), {});
      for (int i = 0; i < 256; ++i) {
        const double wanted = fp8_value(format, i);
        EXPECT_EQ(std::isnan(out[i]), std::isnan(wanted)) << "code " << i;
        EXPECT_EQ(std::signbit(out[i]), i >= 128) << "code " << i;
        if (!std::isnan(wanted)) {
          EXPECT_EQ(out[i], wanted) << "code " << i;
        }
      }
    }
  });
}

// Every code and every tie between codes, and the floats next to each, with both signs.
TEST(Fp8, NarrowingAroundAllTies) {
  for (DType format : formats) {
    std::vector<float> x;
    const auto add = [&](float v) {
      for (float s : {v, -v}) {
        if (x.size() % block == 0) x.push_back(largest(format));  // makes the block's scale 1
        x.push_back(s);
      }
    };
    for (int code = 0; fp8_value(format, code) < largest(format); ++code) {
      const float low = static_cast<float>(fp8_value(format, code));
      const float high = static_cast<float>(fp8_value(format, code + 1)), tie = (low + high) / 2;
      for (float v : {low, tie}) {
        for (float near : {v, std::nextafter(v, 0.0f), std::nextafter(v, high)}) add(near);
      }
    }
    add(1e-42f);
    x.resize((x.size() + block - 1) / block * block, largest(format));
    const int64_t rows = static_cast<int64_t>(x.size()) / block, ld = row_scale_ld(rows);
    for_each_isa([&] {
      std::vector<uint8_t> q(x.size());
      std::vector<float> scale(ld);
      const Tensor codes(q.data(), format, {rows, block});
      quantize_1x128(view(x, {rows, block}), nullptr, {}, codes, view(scale, {1, ld}), {});
      for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(q[i], fp8_nearest(format, x[i])) << x[i];
    });
  }
}

void check_1x128(int64_t rows, int64_t hidden, bool with_offsets, DType in, DType format, QuantizeParams params,
                 Rng& rng) {
  SCOPED_TRACE("R=" + std::to_string(rows) + " H=" + std::to_string(hidden));
  const std::vector<int64_t> at = {0, rows / 3, rows - rows / 4};
  const int64_t used = with_offsets ? at.back() : rows, ld = row_scale_ld(rows);
  const Array x = wild(in, {rows, hidden}, rng, used * hidden);
  const Tensor offsets = view(at, {3});
  Array scale(DType::f32, {hidden / block, ld});
  const auto run = [&](int threads, Array& q) {
    scale.fill(std::nan(""));
    quantize_1x128(x.view(), with_offsets ? &offsets : nullptr, params, q.view(), scale.view(), {nullptr, threads});
  };
  Array q(format, {rows, hidden});
  run(2, q);
  for (int64_t b = 0; b < hidden / block; ++b) {
    for (int64_t r = 0; r < ld; ++r) {
      if (r >= used) {
        ASSERT_EQ(scale[b * ld + r], 0);
        for (int64_t i = 0; r < rows && i < block; ++i) ASSERT_EQ(q.bytes()[r * hidden + b * block + i], 0);
        continue;
      }
      std::vector<double> values;
      const int64_t first = r * hidden + b * block;
      for (int64_t i = 0; i < block; ++i) values.push_back(x[first + i]);
      expect_block(values, format, params, scale[b * ld + r], [&](size_t i) { return q.bytes()[first + i]; });
    }
  }
  const Array first = scale;
  expect_same_bits(Array(format, {rows, hidden}), [&](int threads, Array& out) {
    run(threads, out);
    EXPECT_EQ(scale.bytes(), first.bytes());
  });
}

void check_128x128(int64_t experts, int64_t n, int64_t k, DType in, DType format, QuantizeParams params, Rng& rng) {
  SCOPED_TRACE("E=" + std::to_string(experts) + " N=" + std::to_string(n) + " K=" + std::to_string(k));
  const Array w = wild(in, {experts, n, k}, rng);
  Array qt(format, {experts, k, n}), scale(DType::f32, {experts, n / block, k / block});
  const auto run = [&](int threads, Array& q) {
    quantize_128x128(w.view(), params, q.view(), qt.view(), scale.view(), {nullptr, threads});
  };
  Array q(format, {experts, n, k});
  run(2, q);
  for (int64_t s = 0; s < scale.count(); ++s) {
    const int64_t first = s / (k / block) * block * k + s % (k / block) * block;  // rows of all experts
    const auto at = [&](int64_t i) { return first + i / block * k + i % block; };
    std::vector<double> values;
    for (int64_t i = 0; i < block * block; ++i) values.push_back(w[at(i)]);
    expect_block(values, format, params, scale[s], [&](size_t i) { return q.bytes()[at(i)]; });
  }
  for (int64_t i = 0; i < q.count(); ++i) {
    ASSERT_EQ(qt.bytes()[i / (n * k) * n * k + i % k * n + i / k % n], q.bytes()[i]);
  }
  const Array first = qt;
  expect_same_bits(Array(format, {experts, n, k}), [&](int threads, Array& out) {
    run(threads, out);
    EXPECT_EQ(qt.bytes(), first.bytes());
  });
}

void check_rowcol(const std::vector<int64_t>& rows, int64_t tail, int64_t hidden, DType in, DType format,
                  QuantizeParams params, Rng& rng) {
  SCOPED_TRACE("E=" + std::to_string(rows.size()) + " H=" + std::to_string(hidden));
  const std::vector<int64_t> at = offsets_of(rows);
  const int64_t experts = static_cast<int64_t>(rows.size()), used = at.back(), r = used + tail;
  const int64_t p = padded_rows(r, experts);
  const Array x = wild(in, {r, hidden}, rng, used * hidden);
  const Tensor offsets = view(at, {experts + 1});
  Array scale(DType::f32, {hidden / block, row_scale_ld(r)});
  Array qt(format, {hidden, p}), scale_t(DType::f32, {p / block, hidden});
  const auto run = [&](int threads, Array& q) {
    quantize_rowcol(x.view(), offsets, params, q.view(), scale.view(), qt.view(), scale_t.view(), {nullptr, threads});
  };
  Array q(format, {r, hidden});
  run(2, q);
  Array q_rows(format, {r, hidden}), scale_rows(DType::f32, {hidden / block, row_scale_ld(r)});
  quantize_1x128(x.view(), &offsets, params, q_rows.view(), scale_rows.view(), {});
  EXPECT_EQ(q.bytes(), q_rows.bytes());
  EXPECT_EQ(scale.bytes(), scale_rows.bytes());
  int64_t col = 0;  // of qt
  const auto expect_zero = [&](int64_t h, int64_t end) {
    for (; col < end; ++col) ASSERT_EQ(qt.bytes()[h * p + col], 0) << "padding at " << col;
  };
  for (int64_t h = 0; h < hidden; ++h) {
    col = 0;
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t first = at[e]; first < at[e + 1]; first += block) {
        std::vector<double> values;
        for (int64_t i = first; i < std::min(first + block, at[e + 1]); ++i) values.push_back(x[i * hidden + h]);
        expect_block(values, format, params, scale_t[col / block * hidden + h],
                     [&](size_t i) { return qt.bytes()[h * p + col + static_cast<int64_t>(i)]; });
        const int64_t end = col + block;
        col += static_cast<int64_t>(values.size());
        expect_zero(h, end);
      }
    }
    for (int64_t b = col / block; b < p / block; ++b) ASSERT_EQ(scale_t[b * hidden + h], 0);
    expect_zero(h, p);
  }
  const Array first = qt, first_scale = scale_t;
  expect_same_bits(Array(format, {r, hidden}), [&](int threads, Array& out) {
    run(threads, out);
    EXPECT_EQ(qt.bytes(), first.bytes());
    EXPECT_EQ(scale_t.bytes(), first_scale.bytes());
  });
}

TEST(Quantize, MatchesReferenceOnRandomShapes) {
  Rng rng(1);
  for_each_isa([&] {
    for (int trial = 0; trial < 24; ++trial) {
      const DType in = trial % 2 ? DType::f32 : DType::bf16, format = formats[trial / 2 % 2];
      const QuantizeParams params = {trial % 3 == 0, trial % 5 ? 1e-12 : 0.5};
      const int64_t rows = pick(rng, {0, 1, 2, 7, 8, 127, 129}), hidden = pick(rng, {0, 128, 256, 768});
      check_1x128(rows, hidden, trial % 2, in, format, params, rng);
      check_128x128(pick(rng, {0, 1, 3}), pick(rng, {0, 128, 256}), pick(rng, {128, 384}), in, format, params, rng);
      const std::vector<int64_t> loads = random_rows(rng, pick(rng, {1, 3, 8}));
      check_rowcol(loads, pick(rng, {0, 1, 19}), pick(rng, {128, 256}), in, format, params, rng);
    }
    check_rowcol({}, 5, 128, DType::f32, DType::e4m3, {}, rng);
    check_rowcol({1, 0, 128, 256, 0}, 0, 1152, DType::bf16, DType::e4m3, {}, rng);
  });
}

// Outputs too large for the caches are written past them: same bits as in small parts.
TEST(Quantize, LargeOutputsEqualSmallOnes) {
  const int64_t hidden = 256, part = 1024, parts = cpu::last_level_cache() / 2 / hidden / part + 1;
  const int64_t rows = parts * part + 1;
  Rng rng(2);
  Array x(DType::bf16, {rows, hidden});
  for (int64_t i = 0; i < x.count(); ++i) x.set(i, static_cast<int>(rng() % 8192) - 4096);
  const int64_t ld = row_scale_ld(rows), p = padded_rows(rows, 1), ld_part = row_scale_ld(part);
  for_each_isa([&] {
    Array scale(DType::f32, {2, ld}), scale_t(DType::f32, {p / block, hidden});
    std::vector<uint8_t> q(rows * hidden + 64), qt(hidden * p + 64);
    const auto aligned = [](std::vector<uint8_t>& v) {
      return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64;
    };
    const std::vector<int64_t> all = {0, rows}, some = {0, part};
    quantize_rowcol(x.view(), view(all, {2}), {}, Tensor(aligned(q), DType::e4m3, {rows, hidden}), scale.view(),
                    Tensor(aligned(qt), DType::e4m3, {hidden, p}), scale_t.view(), {nullptr, 2});
    Array q_part(DType::e4m3, {part, hidden}), s_part(DType::f32, {2, ld_part}), qt_part(DType::e4m3, {hidden, part}),
        st_part(DType::f32, {part / block, hidden});
    for (int64_t i = 0; i < parts; ++i) {
      const Tensor x_part(x.view().ptr<bf16_t>() + i * part * hidden, DType::bf16, {part, hidden});
      quantize_rowcol(x_part, view(some, {2}), {}, q_part.view(), s_part.view(), qt_part.view(), st_part.view(), {});
      ASSERT_EQ(std::memcmp(q_part.bytes().data(), aligned(q) + i * part * hidden, part * hidden), 0) << i;
      for (int64_t h = 0; h < hidden; ++h) {
        ASSERT_EQ(std::memcmp(qt_part.bytes().data() + h * part, aligned(qt) + h * p + i * part, part), 0) << i;
      }
    }
  });
}

TEST(Dequantize, MultipliesByTheScale) {
  Rng rng(3);
  for_each_isa([&] {
    for (DType out_dtype : {DType::f32, DType::bf16}) {
      for (DType format : formats) {
        const int64_t rows = 37, hidden = 256, ld = row_scale_ld(rows);
        const Array q = Array(format, {rows, hidden}).randomise(rng), scale = Array(DType::f32, {2, ld}).randomise(rng);
        const auto run = [&](int threads, Array& out) {
          dequantize(q.view(), scale.view(), out.view(), {nullptr, threads});
        };
        Array out(out_dtype, {rows, hidden});
        run(2, out);
        for (int64_t i = 0; i < q.count(); ++i) {
          const double wanted = q[i] * scale[i % hidden / block * ld + i / hidden];
          ASSERT_NEAR(out[i], wanted, out.rounding(wanted));
        }
        expect_same_bits(Array(out_dtype, {rows, hidden}), run);
        const Array w = Array(format, {2, 128, 256}).randomise(rng);
        const Array scales = Array(DType::f32, {2, 1, 2}).randomise(rng);
        Array back(out_dtype, {2, 128, 256});
        dequantize(w.view(), scales.view(), back.view(), {});
        for (int64_t i = 0; i < w.count(); ++i) {
          const double wanted = w[i] * scales[i / (128 * 256) * 2 + i % 256 / block];
          ASSERT_NEAR(back[i], wanted, back.rounding(wanted));
        }
      }
    }
  });
}

TEST(Quantize, NamesBadArguments) {
  const Array x(DType::f32, {8, 128}), odd(DType::f32, {8, 96}), q(DType::e4m3, {8, 128}), scale(DType::f32, {1, 8});
  const auto call = [&](const Array& in, const Array& out, QuantizeParams params) {
    return [&, params] { quantize_1x128(in.view(), nullptr, params, out.view(), scale.view(), {}); };
  };
  expect_error(call(odd, q, {}), "quantize_1x128: H must be a multiple of 128 for float8");
  expect_error(call(odd, q, {}), "got 96; use bfloat16 for this layer");
  expect_error(call(x, x, {}), "q must be float8_e4m3fn or float8_e5m2 [R=8, H=128], got float32 [8, 128] on cpu");
  expect_error(call(x, q, {false, 0.0}), "quantize_1x128: eps must be in [1e-30, 1], got 0");
  const Array w(DType::f32, {1, 128, 64}), qt(DType::e4m3, {128, 8}), scale_t(DType::f32, {1, 128});
  expect_error([&] { quantize_128x128(w.view(), {}, q.view(), q.view(), scale.view(), {}); },
               "quantize_128x128: K must be a multiple of 128");
  std::vector<int64_t> at = {0, 9};
  const auto rowcol = [&](const Array& turned) {
    return [&, turned] {
      quantize_rowcol(x.view(), view(at, {2}), {}, q.view(), scale.view(), turned.view(), scale_t.view(), {});
    };
  };
  expect_error(rowcol(qt), "qt must be float8_e4m3fn [H=128, P=128], got float8_e4m3fn [128, 8] on cpu");
  expect_error(rowcol(Array(DType::e4m3, {128, 128})), "quantize_rowcol: offsets[1]=9 exceeds the 8 rows there are");
  expect_error([&] { dequantize(q.view(), Array(DType::f32, {1, 4}).view(), x.view(), {}); },
               "dequantize: scale must have a column for each of the R=8 rows, got 4");
}

}  // namespace
}  // namespace xt::test
