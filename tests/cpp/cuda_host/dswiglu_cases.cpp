#include "gemm_cases.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/gemm_m_grouped_dswiglu.h"

namespace xt::test {
namespace {

// One rounding to its dtype, and that of a few operations on terms of such a size.
void require_near(const Array& got, int64_t i, double wanted, double size, const char* name) {
  const double limit = 6e-6 * (std::fabs(wanted) + size) + 1.01 * got.rounding(wanted);
  require(std::fabs(got[i] - wanted) <= limit, name, "[", i, "] is ", got[i], ", wanted ", wanted);
}

}  // namespace

void dswiglu_case(Rng& rng, const DswigluCase& c) {
  const std::vector<int64_t> at = offsets_of(c.rows);
  const int64_t experts = static_cast<int64_t>(c.rows.size()), used = at.back(), r = used + c.tail;
  const Array dy = Array(c.in, {r, c.k}).randomise(rng, used * c.k), b = Array(c.in, {experts, c.k, c.n}).randomise(rng);
  const Array x = Array(c.in, {r, 2 * c.n}).randomise(rng, used * 2 * c.n);
  const Array weights = Array(DType::f32, {r}).randomise(rng, used);
  Array dx(c.in, {r, 2 * c.n}), act(c.in, {r, c.n}), dweights(DType::f32, {r});
  const Tensor offsets = view(at, {experts + 1});
  const SwigluParams swiglu = {1.702, 1.0, 0.5};

  OnMachine d;
  const Tensor d_x = d.in("x", x.view()), d_weights = d.in("weights", weights.view());
  const Tensor d_dweights = d.out("dweights", dweights.view());
  const Array space(DType::f32, {gemm_m_grouped_dswiglu_workspace_size(d_x)});
  const Tensor d_space = d.out("workspace", space.view());
  DswigluOptions options = {swiglu};
  if (c.weighted) options = {swiglu, &d_weights, &d_dweights, &d_space};
  gemm_m_grouped_dswiglu(d.in("dy", dy.view()), d.in("b", b.view()), d.in("offsets", offsets), d_x,
                         d.out("dx", dx.view()), d.out("act", act.view()), d.stream(), options);
  require(d.fault() == no_fault, "fault ", d.fault());

  // The device's own product, as its error is amplified.
  OnMachine again;
  Array g(c.in, {r, c.n}), alone_dx(c.in, {r, 2 * c.n}), alone_act(c.in, {r, c.n});
  const Tensor d_offsets = again.in("offsets", offsets), d_g = again.out("g", g.view());
  gemm_m_grouped(again.in("dy", dy.view()), again.in("b", b.view()), d_offsets, false, d_g, again.stream());
  if (!c.weighted) {
    OnMachine third;
    const Tensor o = third.in("offsets", offsets), tx = third.in("x", x.view());
    swiglu_bwd(third.in("g", g.view()), tx, &o, swiglu, third.out("dx", alone_dx.view()), third.stream());
    xt::swiglu(tx, &o, swiglu, third.out("act", alone_act.view()), third.stream());
    require(dx.bytes() == alone_dx.bytes(), "dx is not what swiglu_bwd makes of the product");
    return require(act.bytes() == alone_act.bytes(), "act is not what swiglu makes of x");
  }
  for (int64_t i = 0; i < r; ++i) {
    double dot = 0, size = 0;
    for (int64_t j = 0; j < c.n; ++j) {
      const int64_t gate_at = i * 2 * c.n + j, up_at = gate_at + c.n;
      double dgate = 0, dup = 0, a = 0, scale = 0;
      if (i < used) {
        const double gate = std::min(x[gate_at], 1.0), up = std::clamp(x[up_at], -1.0, 1.0) + 0.5;
        const double s = 1 / (1 + std::exp(-swiglu.alpha * gate)), grad = g[i * c.n + j], w = weights[i];
        a = gate * s * up;
        dgate = x[gate_at] > 1 ? 0 : w * grad * up * (s + swiglu.alpha * gate * s * (1 - s));
        dup = std::fabs(x[up_at]) > 1 ? 0 : w * grad * gate * s;
        scale = std::fabs(w * grad);
        dot += grad * a;
        size += std::fabs(grad * a);
        a *= w;
      }
      require_near(dx, gate_at, dgate, scale, "dx of gate");
      require_near(dx, up_at, dup, scale, "dx of up");
      require_near(act, i * c.n + j, a, 0, "act");
    }
    require_near(dweights, i, dot, size, "dweights");
  }
}

}  // namespace xt::test
