// Attention over packed documents.
#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/attention.h"

namespace xt::python {
namespace {

void attention(py::handle q, py::handle k, py::handle v, py::handle cu_q, py::handle cu_k, double scale, bool causal,
               py::handle out, py::handle lse, int num_threads) {
  const char* op = "attention";
  Arg tq(op, "q", q), tk(op, "k", k), tv(op, "v", v), cq(op, "cu_q", cu_q), ck(op, "cu_k", cu_k), o(op, "out", out),
      l(op, "lse", lse);
  py::gil_scoped_release nogil;
  xt::attention(*tq, *tk, *tv, *cq, *ck, scale, causal, *o, *l, stream_of(tq, num_threads));
}

void attention_bwd(py::handle dout, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                   py::handle cu_q, py::handle cu_k, double scale, bool causal, py::handle dq, py::handle dk,
                   py::handle dv, int num_threads) {
  const char* op = "attention_bwd";
  Arg g(op, "dout", dout), tq(op, "q", q), tk(op, "k", k), tv(op, "v", v), o(op, "out", out), l(op, "lse", lse),
      cq(op, "cu_q", cu_q), ck(op, "cu_k", cu_k), gq(op, "dq", dq), gk(op, "dk", dk), gv(op, "dv", dv);
  py::gil_scoped_release nogil;
  xt::attention_bwd(*g, *tq, *tk, *tv, *o, *l, *cq, *ck, scale, causal, *gq, *gk, *gv, stream_of(g, num_threads));
}

}  // namespace

void bind_attention(py::module_& m) {
  using namespace py::literals;
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "cu_q"_a, "cu_k"_a, "scale"_a, "causal"_a, "out"_a, "lse"_a,
        "num_threads"_a);
  m.def("attention_bwd", &attention_bwd, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "cu_q"_a, "cu_k"_a,
        "scale"_a, "causal"_a, "dq"_a, "dk"_a, "dv"_a, "num_threads"_a);
}

}  // namespace xt::python
