// Losses over logits.
#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/cross_entropy.h"

namespace xt::python {
namespace {

void cross_entropy(py::handle logits, py::handle labels, py::handle weights, bool gradient, py::handle losses,
                   int num_threads) {
  const char* op = "cross_entropy";
  Arg x(op, "logits", logits), l(op, "labels", labels), w(op, "weights", weights), o(op, "losses", losses);
  py::gil_scoped_release nogil;
  xt::cross_entropy(*x, *l, *w, gradient, *o, stream_of(x, num_threads));
}

}  // namespace

void bind_loss(py::module_& m) {
  using namespace py::literals;
  m.def("cross_entropy", &cross_entropy, "logits"_a, "labels"_a, "weights"_a, "gradient"_a, "losses"_a,
        "num_threads"_a);
}

}  // namespace xt::python
