// The MoE ops: routing, token movement, grouped products, SwiGLU.
#include <pybind11/stl.h>

#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/gemm_m_grouped_dswiglu.h"
#include "xtuner/ops/permute.h"
#include "xtuner/ops/route_map.h"
#include "xtuner/ops/swiglu.h"
#include "xtuner/ops/topk_softmax.h"
#include "xtuner/ops/unpermute.h"

namespace xt::python {
namespace {

void route_map(py::handle topk_idx, int64_t align, py::handle counts, py::handle offsets, py::handle row_of,
               py::handle src, int num_threads, py::handle workspace) {
  const char* op = "route_map";
  Arg i(op, "topk_idx", topk_idx), c(op, "counts", counts), o(op, "offsets", offsets), r(op, "row_of", row_of),
      s(op, "src", src);
  OptionalArg w(op, "workspace", workspace);
  py::gil_scoped_release nogil;
  xt::route_map(*i, align, *c, *o, *r, *s, stream_of(i, num_threads), w.get());
}

int64_t route_map_workspace_size(py::handle topk_idx, int64_t num_experts) {
  const Arg i("route_map_workspace_size", "topk_idx", topk_idx);
  return xt::route_map_workspace_size((*i).numel(), num_experts, (*i).device.type);
}

void topk_softmax(py::handle logits, py::handle choice_bias, py::handle topk_idx, bool normalise, py::handle weights,
                  py::handle idx, py::handle probs, py::handle logsumexp, py::handle counts, py::handle prob_sum,
                  py::handle z_sum, py::handle entropy_sum, py::handle workspace, int num_threads) {
  const char* op = "topk_softmax";
  Arg l(op, "logits", logits), w(op, "weights", weights), i(op, "idx", idx), p(op, "probs", probs),
      lse(op, "logsumexp", logsumexp), c(op, "counts", counts), ps(op, "prob_sum", prob_sum), z(op, "z_sum", z_sum),
      e(op, "entropy_sum", entropy_sum), space(op, "workspace", workspace);
  OptionalArg bias(op, "choice_bias", choice_bias), given(op, "topk_idx", topk_idx);
  py::gil_scoped_release nogil;
  xt::topk_softmax(*l, bias.get(), given.get(), normalise, {*w, *i, *p, *lse, *c, *ps, *z, *e}, *space,
                   stream_of(l, num_threads));
}

void topk_softmax_bwd(py::handle dweights, py::handle dprob_sum, py::handle dz_sum, py::handle probs,
                      py::handle logsumexp, py::handle idx, bool normalise, py::handle dlogits, int num_threads) {
  const char* op = "topk_softmax_bwd";
  OptionalArg dw(op, "dweights", dweights), dp(op, "dprob_sum", dprob_sum), dz(op, "dz_sum", dz_sum);
  Arg p(op, "probs", probs), lse(op, "logsumexp", logsumexp), i(op, "idx", idx), d(op, "dlogits", dlogits);
  py::gil_scoped_release nogil;
  xt::topk_softmax_bwd(dw.get(), dp.get(), dz.get(), *p, *lse, *i, normalise, *d, stream_of(p, num_threads));
}

void permute(py::handle x, py::handle row_of, py::handle src, py::handle out, int num_threads) {
  const char* op = "permute";
  Arg a(op, "x", x), r(op, "row_of", row_of), s(op, "src", src), o(op, "out", out);
  py::gil_scoped_release nogil;
  xt::permute(*a, *r, *s, *o, stream_of(a, num_threads));
}

void unpermute(py::handle y, py::handle row_of, py::handle probs, py::handle out, int num_threads) {
  const char* op = "unpermute";
  Arg a(op, "y", y), r(op, "row_of", row_of), o(op, "out", out);
  OptionalArg p(op, "probs", probs);
  py::gil_scoped_release nogil;
  xt::unpermute(*a, *r, p.get(), *o, stream_of(a, num_threads));
}

void unpermute_bwd(py::handle dout, py::handle y, py::handle src, py::handle row_of, py::handle probs, py::handle dy,
                   py::handle dprobs, int num_threads) {
  const char* op = "unpermute_bwd";
  Arg a(op, "dout", dout), s(op, "src", src), r(op, "row_of", row_of), d(op, "dy", dy);
  OptionalArg rows(op, "y", y), p(op, "probs", probs), dp(op, "dprobs", dprobs);
  py::gil_scoped_release nogil;
  xt::unpermute_bwd(*a, rows.get(), *s, *r, p.get(), *d, dp.get(), stream_of(a, num_threads));
}

void gemm_m_grouped(py::handle a, py::handle b, py::handle offsets, bool trans_b, py::handle bias, py::handle src,
                    int64_t num_experts_per_tok, py::handle act, double alpha, std::optional<double> limit,
                    double up_offset, bool accumulate, py::handle out, int num_threads) {
  const char* op = "gemm_m_grouped";
  Arg ta(op, "a", a), tb(op, "b", b), to(op, "offsets", offsets), tc(op, "out", out);
  OptionalArg bi(op, "bias", bias), s(op, "src", src), ac(op, "act", act);
  const GemmMGroupedOptions options = {{s.get(), num_experts_per_tok}, bi.get(), ac.get(), {alpha, limit, up_offset},
                                       accumulate};
  py::gil_scoped_release nogil;
  xt::gemm_m_grouped(*ta, *tb, *to, trans_b, *tc, stream_of(ta, num_threads), options);
}

void gemm_m_grouped_dswiglu(py::handle dy, py::handle b, py::handle offsets, py::handle x, py::handle weights,
                            double alpha, std::optional<double> limit, double up_offset, py::handle dx, py::handle act,
                            py::handle dweights, py::handle workspace, int num_threads) {
  const char* op = "gemm_m_grouped_dswiglu";
  Arg tdy(op, "dy", dy), tb(op, "b", b), to(op, "offsets", offsets), tx(op, "x", x), tdx(op, "dx", dx), ta(op, "act", act);
  OptionalArg w(op, "weights", weights), dw(op, "dweights", dweights), space(op, "workspace", workspace);
  const DswigluOptions options = {{alpha, limit, up_offset}, w.get(), dw.get(), space.get()};
  py::gil_scoped_release nogil;
  xt::gemm_m_grouped_dswiglu(*tdy, *tb, *to, *tx, *tdx, *ta, stream_of(tdy, num_threads), options);
}

int64_t gemm_m_grouped_dswiglu_workspace_size(py::handle x) {
  const Arg a("gemm_m_grouped_dswiglu_workspace_size", "x", x);
  return xt::gemm_m_grouped_dswiglu_workspace_size(*a);
}

void gemm_k_grouped(py::handle a, py::handle b, py::handle offsets, double beta, py::handle src,
                    int64_t num_experts_per_tok, py::handle out, int num_threads) {
  const char* op = "gemm_k_grouped";
  Arg ta(op, "a", a), tb(op, "b", b), to(op, "offsets", offsets), tc(op, "out", out);
  OptionalArg s(op, "src", src);
  py::gil_scoped_release nogil;
  xt::gemm_k_grouped(*ta, *tb, *to, beta, *tc, stream_of(ta, num_threads), {s.get(), num_experts_per_tok});
}

void swiglu(py::handle x, py::handle offsets, double alpha, std::optional<double> limit, double up_offset,
            py::handle out, int num_threads) {
  const char* op = "swiglu";
  Arg a(op, "x", x), o(op, "out", out);
  OptionalArg off(op, "offsets", offsets);
  py::gil_scoped_release nogil;
  xt::swiglu(*a, off.get(), {alpha, limit, up_offset}, *o, stream_of(a, num_threads));
}

void swiglu_bwd(py::handle dout, py::handle x, py::handle offsets, double alpha, std::optional<double> limit,
                double up_offset, py::handle dx, int num_threads) {
  const char* op = "swiglu_bwd";
  Arg g(op, "dout", dout), a(op, "x", x), d(op, "dx", dx);
  OptionalArg off(op, "offsets", offsets);
  py::gil_scoped_release nogil;
  xt::swiglu_bwd(*g, *a, off.get(), {alpha, limit, up_offset}, *d, stream_of(g, num_threads));
}

}  // namespace

void bind_moe(py::module_& m) {
  using namespace py::literals;
  m.def("route_map", &route_map, "topk_idx"_a, "align"_a, "counts"_a, "offsets"_a, "row_of"_a, "src"_a,
        "num_threads"_a, "workspace"_a = py::none());
  m.def("route_map_workspace_size", &route_map_workspace_size, "topk_idx"_a, "num_experts"_a);
  m.attr("topk_softmax_block_tokens") = topk_softmax_block_tokens;
  m.def("topk_softmax", &topk_softmax, "logits"_a, "choice_bias"_a, "topk_idx"_a, "normalise"_a, "weights"_a, "idx"_a,
        "probs"_a, "logsumexp"_a, "counts"_a, "prob_sum"_a, "z_sum"_a, "entropy_sum"_a, "workspace"_a,
        "num_threads"_a);
  m.def("topk_softmax_bwd", &topk_softmax_bwd, "dweights"_a, "dprob_sum"_a, "dz_sum"_a, "probs"_a, "logsumexp"_a,
        "idx"_a, "normalise"_a, "dlogits"_a, "num_threads"_a);
  m.def("permute", &permute, "x"_a, "row_of"_a, "src"_a, "out"_a, "num_threads"_a);
  m.def("unpermute", &unpermute, "y"_a, "row_of"_a, "probs"_a, "out"_a, "num_threads"_a);
  m.def("unpermute_bwd", &unpermute_bwd, "dout"_a, "y"_a, "src"_a, "row_of"_a, "probs"_a, "dy"_a, "dprobs"_a,
        "num_threads"_a);
  const py::none none;
  m.def("gemm_m_grouped", &gemm_m_grouped, "a"_a, "b"_a, "offsets"_a, "trans_b"_a, py::kw_only(), "bias"_a = none,
        "src"_a = none, "num_experts_per_tok"_a = 1, "act"_a = none, "alpha"_a = 1.0, "limit"_a = none,
        "up_offset"_a = 0.0, "accumulate"_a = false, "out"_a, "num_threads"_a);
  m.def("gemm_m_grouped_dswiglu", &gemm_m_grouped_dswiglu, "dy"_a, "b"_a, "offsets"_a, "x"_a, py::kw_only(),
        "weights"_a = none, "alpha"_a = 1.0, "limit"_a = none, "up_offset"_a = 0.0, "dx"_a, "act"_a,
        "dweights"_a = none, "workspace"_a = none, "num_threads"_a);
  m.def("gemm_m_grouped_dswiglu_workspace_size", &gemm_m_grouped_dswiglu_workspace_size, "x"_a);
  m.def("gemm_k_grouped", &gemm_k_grouped, "a"_a, "b"_a, "offsets"_a, "beta"_a, py::kw_only(), "src"_a = none,
        "num_experts_per_tok"_a = 1, "out"_a, "num_threads"_a);
  m.def("swiglu", &swiglu, "x"_a, "offsets"_a, "alpha"_a, "limit"_a, "up_offset"_a, "out"_a, "num_threads"_a);
  m.def("swiglu_bwd", &swiglu_bwd, "dout"_a, "x"_a, "offsets"_a, "alpha"_a, "limit"_a, "up_offset"_a, "dx"_a,
        "num_threads"_a);
}

}  // namespace xt::python
