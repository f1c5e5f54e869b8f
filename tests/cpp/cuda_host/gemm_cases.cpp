#include "gemm_cases.h"

#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"

namespace xt::test {
namespace {

// Sums of `terms` products of normal values in two orders, then one rounding each: neighbours may result.
void require_close(const Array& got, const Array& cpu, int64_t terms, const char* name) {
  const double sums = (2 + std::sqrt(static_cast<double>(terms))) * std::sqrt(static_cast<double>(terms) + 1) * 2e-7;
  for (int64_t i = 0; i < cpu.count(); ++i) {
    const double limit = sums + 2.02 * cpu.rounding(cpu[i]);
    require(std::fabs(got[i] - cpu[i]) <= limit, name, "[", i, "] is ", got[i], ", on the CPU ", cpu[i]);
  }
}

// A map of `used` rows into tokens, some of them rows of padding, and its tail, which nobody may read.
struct Map {
  std::vector<int32_t> src;
  int64_t tokens;

  Map(Rng& rng, int64_t used, int64_t tail, int64_t per_token)
      : src(used + tail, INT32_MAX), tokens(used / per_token + 1) {
    for (int64_t r = 0; r < used; ++r) {
      src[r] = rng() % 8 ? static_cast<int32_t>(rng() % (tokens * per_token)) : -1;
    }
  }
};

}  // namespace

std::string GemmCase::name() const {
  std::string s = "rows";
  for (int64_t r : rows) s += " " + std::to_string(r);
  return s + " tail " + std::to_string(tail) + " n " + std::to_string(n);
}

void m_grouped_case(Rng& rng, const MCase& c) {
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t experts = static_cast<int64_t>(c.rows.size()), used = at.back(), r = used + c.tail;
  const bool mapped = c.per_token > 0;
  const Map map(rng, used, c.tail, mapped ? c.per_token : 1);
  const int64_t lines = mapped ? map.tokens : r;
  const Array a = Array(c.in, {lines, c.k}).randomise(rng, (mapped ? lines : used) * c.k);
  const Array b = Array(c.in, {experts, c.trans_b ? c.n : c.k, c.trans_b ? c.k : c.n}).randomise(rng);
  const Array bias = Array(c.out, {experts, c.n}).randomise(rng);
  Array out(c.out, {r, c.n}), act(c.out, {r, c.n / 2}), cpu_out = out, cpu_act = act;
  const Tensor offsets = view(at, {experts + 1}), src = view(map.src, {r});

  OnMachine d;
  const Tensor d_src = d.in("src", src), d_bias = d.in("bias", bias.view()), d_act = d.out("act", act.view());
  const SwigluParams swiglu = {1.702, 7.0, 1.0};
  GemmMGroupedOptions on_device, on_cpu;
  if (mapped) on_device.gather = {&d_src, c.per_token}, on_cpu.gather = {&src, c.per_token};
  const Tensor cpu_bias = bias.view(), cpu_act_view = cpu_act.view();
  if (c.bias) on_device.bias = &d_bias, on_cpu.bias = &cpu_bias;
  if (c.swiglu) on_device.act = &d_act, on_cpu.act = &cpu_act_view, on_device.swiglu = on_cpu.swiglu = swiglu;

  gemm_m_grouped(d.in("a", a.view()), d.in("b", b.view()), d.in("offsets", offsets), c.trans_b,
                 d.out("out", out.view()), d.stream(), on_device);
  gemm_m_grouped(a.view(), b.view(), offsets, c.trans_b, cpu_out.view(), {}, on_cpu);
  require(d.fault() == no_fault, "fault ", d.fault());
  require_close(out, cpu_out, c.k, "out");
  if (!c.swiglu) return;
  // From the device's own product, as the product's error is amplified.
  OnMachine again;
  Array alone(c.out, {r, c.n / 2});
  const Tensor d_offsets = again.in("offsets", offsets);
  xt::swiglu(again.in("x", out.view()), &d_offsets, swiglu, again.out("act", alone.view()), again.stream());
  require(act.bytes() == alone.bytes(), "act is not what swiglu makes of out");
}

void k_grouped_case(Rng& rng, const KCase& c) {
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t experts = static_cast<int64_t>(c.rows.size()), used = at.back(), r = used + c.tail;
  const bool mapped = c.per_token > 0;
  const Map map(rng, used, c.tail, mapped ? c.per_token : 1);
  const int64_t lines = mapped ? map.tokens : r;
  const Array a = Array(c.in, {r, c.m}).randomise(rng, used * c.m);
  const Array b = Array(c.in, {lines, c.n}).randomise(rng, (mapped ? lines : used) * c.n);
  Array out(c.out, {experts, c.m, c.n});
  if (c.accumulate) out.randomise(rng);
  Array cpu_out = out;
  const Tensor offsets = view(at, {experts + 1}), src = view(map.src, {r});

  OnMachine d;
  const Tensor d_src = d.in("src", src);
  RowGather on_device, on_cpu;
  if (mapped) on_device = {&d_src, c.per_token}, on_cpu = {&src, c.per_token};
  const Tensor d_out = c.accumulate ? d.in_out("out", out.view()) : d.out("out", out.view());
  gemm_k_grouped(d.in("a", a.view()), d.in("b", b.view()), d.in("offsets", offsets), c.accumulate, d_out, d.stream(),
                 on_device);
  gemm_k_grouped(a.view(), b.view(), offsets, c.accumulate, cpu_out.view(), {}, on_cpu);
  require(d.fault() == no_fault, "fault ", d.fault());
  require_close(out, cpu_out, used, "out");
}

}  // namespace xt::test
