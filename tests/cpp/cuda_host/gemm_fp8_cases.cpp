#include "gemm_fp8_cases.h"

#include "xtuner/ops/gemm_k_grouped_fp8.h"
#include "xtuner/ops/gemm_m_grouped_fp8.h"

namespace xt::test {
namespace {

constexpr int64_t block = 128;

// Blocks of 128 terms are summed in another order than on the CPU, in units of the largest scales; then one rounding.
void require_close(const Array& got, const Array& cpu, int64_t terms, double largest_scale) {
  const double sums = (2 + std::sqrt(static_cast<double>(terms))) * std::sqrt(static_cast<double>(terms) + 1) * 2e-7;
  for (int64_t i = 0; i < cpu.count(); ++i) {
    const double limit = sums * largest_scale + 2.02 * cpu.rounding(cpu[i]);
    require(std::fabs(got[i] - cpu[i]) <= limit, "out[", i, "] is ", got[i], ", on the CPU ", cpu[i]);
  }
}

// Scales between 1/4 and 4 of blocks by lines, in rows of `ld`; NaN from line `used` on.
constexpr double largest = 4;
Array scales(Rng& rng, Shape shape, int64_t ld, int64_t used) {
  Array s(DType::f32, std::move(shape));
  for (int64_t i = 0; i < s.count(); ++i) {
    if (i % ld < used) s.set(i, std::ldexp(1.0 + rng() % 1000 / 1000.0, static_cast<int>(rng() % 4) - 2));
  }
  return s;
}

}  // namespace

std::string Fp8Case::name() const {
  std::string s = "rows";
  for (int64_t r : rows) s += " " + std::to_string(r);
  return s + " n " + std::to_string(n);
}

void m_grouped_fp8_case(Rng& rng, const MFp8Case& c) {
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t experts = static_cast<int64_t>(c.rows.size()), used = at.back(), r = used + c.tail;
  const int64_t ld = c.ld ? c.ld : row_scale_ld(r), kb = c.k / block, nb = c.n / block;
  const Array a = Array(c.a, {r, c.k}).randomise(rng, used * c.k), b = Array(c.b, {experts, c.n, c.k}).randomise(rng);
  const Array scale_a = scales(rng, {kb, ld}, ld, used);
  const Array scale_b = scales(rng, c.swapped_scales ? Shape{experts, kb, nb} : Shape{experts, nb, kb}, 1, 1);
  const auto seen_from_b = [&](Tensor s) {
    if (c.swapped_scales) std::swap(s.shape[1], s.shape[2]), std::swap(s.strides[1], s.strides[2]);
    return s;
  };
  Array out(c.out, {r, c.n}), cpu_out = out;
  const Tensor offsets = view(at, {experts + 1});
  OnMachine d;
  gemm_m_grouped_fp8(d.in_up_to("a", a.view(), used), d.in("scale_a", scale_a.view()), d.in("b", b.view()),
                     seen_from_b(d.in("scale_b", scale_b.view())), d.in("offsets", offsets), d.out("out", out.view()),
                     d.stream());
  gemm_m_grouped_fp8(a.view(), scale_a.view(), b.view(), seen_from_b(scale_b.view()), offsets, cpu_out.view(), {});
  require(d.fault() == no_fault, "fault ", d.fault());
  require_close(out, cpu_out, c.k, largest * largest);
}

void k_grouped_fp8_case(Rng& rng, const KFp8Case& c) {
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t experts = static_cast<int64_t>(c.rows.size()), p = padded_rows(at.back(), experts);
  const auto operand = [&](DType format, int64_t lines) {  // NaN behind the last expert's columns
    Array x(format, {lines, p});
    std::normal_distribution<double> normal;
    for (int64_t line = 0; line < lines; ++line) {
      int64_t column = line * p;
      for (int64_t count : c.rows) {
        const int64_t end = column + (count + block - 1) / block * block;
        for (int64_t i = 0; column < end; ++i, ++column) x.set(column, i < count ? normal(rng) : 0.0);
      }
    }
    return x;
  };
  const Array a = operand(c.a, c.m), b = operand(c.b, c.n);
  int64_t blocks = 0;
  for (int64_t count : c.rows) blocks += (count + block - 1) / block;
  const auto block_scales = [&](int64_t lines) {
    Array s = scales(rng, {p / block, lines}, lines, lines);
    for (int64_t i = blocks * lines; i < s.count(); ++i) s.set(i, std::nan(""));
    return s;
  };
  const Array scale_a = block_scales(c.m), scale_b = block_scales(c.n);
  Array out(c.out, {experts, c.m, c.n});
  if (c.accumulate) out.randomise(rng);
  Array cpu_out = out;
  const Tensor offsets = view(at, {experts + 1});
  OnMachine d;
  const Tensor d_out = c.accumulate ? d.in_out("out", out.view()) : d.out("out", out.view());
  gemm_k_grouped_fp8(d.in("a", a.view()), d.in("scale_a", scale_a.view()), d.in("b", b.view()),
                     d.in("scale_b", scale_b.view()), d.in("offsets", offsets), c.accumulate, d_out, d.stream());
  gemm_k_grouped_fp8(a.view(), scale_a.view(), b.view(), scale_b.view(), offsets, c.accumulate, cpu_out.view(), {});
  require(d.fault() == no_fault, "fault ", d.fault());
  require_close(out, cpu_out, at.back(), largest * largest);
}

}  // namespace xt::test
