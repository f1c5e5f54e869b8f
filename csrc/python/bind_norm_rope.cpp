// What surrounds the products of attention: normalisation and rotary positions.
#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/rms_norm.h"
#include "xtuner/ops/rms_norm_rotary.h"
#include "xtuner/ops/rotary.h"

namespace xt::python {
namespace {

void rms_norm(py::handle x, py::handle weight, double eps, py::handle out, py::handle inverse_rms, int num_threads) {
  const char* op = "rms_norm";
  Arg a(op, "x", x), w(op, "weight", weight), o(op, "out", out), i(op, "inverse_rms", inverse_rms);
  py::gil_scoped_release nogil;
  xt::rms_norm(*a, *w, eps, *o, *i, stream_of(a, num_threads));
}

void rms_norm_bwd(py::handle dout, py::handle x, py::handle weight, py::handle inverse_rms, py::handle dx,
                  py::handle dweight, py::handle workspace, int num_threads) {
  const char* op = "rms_norm_bwd";
  Arg g(op, "dout", dout), a(op, "x", x), w(op, "weight", weight), i(op, "inverse_rms", inverse_rms), d(op, "dx", dx),
      dw(op, "dweight", dweight), space(op, "workspace", workspace);
  py::gil_scoped_release nogil;
  xt::rms_norm_bwd(*g, *a, *w, *i, *d, *dw, *space, stream_of(g, num_threads));
}

void rotary(py::handle x, py::handle cos, py::handle sin, bool back, py::handle out, int num_threads) {
  const char* op = "rotary";
  Arg a(op, "x", x), c(op, "cos", cos), s(op, "sin", sin), o(op, "out", out);
  py::gil_scoped_release nogil;
  xt::rotary(*a, *c, *s, back, *o, stream_of(a, num_threads));
}

void rms_norm_rotary(py::handle x, py::handle weight, py::handle cos, py::handle sin, double eps, py::handle out,
                     py::handle inverse_rms, int num_threads) {
  const char* op = "rms_norm_rotary";
  Arg a(op, "x", x), w(op, "weight", weight), c(op, "cos", cos), s(op, "sin", sin), o(op, "out", out),
      i(op, "inverse_rms", inverse_rms);
  py::gil_scoped_release nogil;
  xt::rms_norm_rotary(*a, *w, *c, *s, eps, *o, *i, stream_of(a, num_threads));
}

void rms_norm_rotary_bwd(py::handle dout, py::handle x, py::handle weight, py::handle cos, py::handle sin,
                         py::handle inverse_rms, py::handle dx, py::handle dweight, py::handle workspace,
                         int num_threads) {
  const char* op = "rms_norm_rotary_bwd";
  Arg g(op, "dout", dout), a(op, "x", x), w(op, "weight", weight), c(op, "cos", cos), s(op, "sin", sin),
      i(op, "inverse_rms", inverse_rms), d(op, "dx", dx), dw(op, "dweight", dweight), space(op, "workspace", workspace);
  py::gil_scoped_release nogil;
  xt::rms_norm_rotary_bwd(*g, *a, *w, *c, *s, *i, *d, *dw, *space, stream_of(g, num_threads));
}

}  // namespace

void bind_norm_rope(py::module_& m) {
  using namespace py::literals;
  m.attr("rms_norm_block_rows") = rms_norm_block_rows;
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a, "inverse_rms"_a, "num_threads"_a);
  m.def("rms_norm_bwd", &rms_norm_bwd, "dout"_a, "x"_a, "weight"_a, "inverse_rms"_a, "dx"_a, "dweight"_a,
        "workspace"_a, "num_threads"_a);
  m.def("rotary", &rotary, "x"_a, "cos"_a, "sin"_a, "back"_a, "out"_a, "num_threads"_a);
  m.def("rms_norm_rotary", &rms_norm_rotary, "x"_a, "weight"_a, "cos"_a, "sin"_a, "eps"_a, "out"_a, "inverse_rms"_a,
        "num_threads"_a);
  m.def("rms_norm_rotary_bwd", &rms_norm_rotary_bwd, "dout"_a, "x"_a, "weight"_a, "cos"_a, "sin"_a, "inverse_rms"_a,
        "dx"_a, "dweight"_a, "workspace"_a, "num_threads"_a);
}

}  // namespace xt::python
