// Expert parallelism: the memory that ranks share, and the ops that exchange rows through it.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/ep_combine.h"
#include "xtuner/ops/ep_dispatch.h"
#include "xtuner/shared_memory.h"

namespace xt::python {
namespace {

// The five tensors of a route, in the order of the struct.
class RouteArg {
 public:
  RouteArg(const char* op, const py::sequence& route) {
    const char* names[] = {"counts", "tokens", "dest", "slot", "origin"};
    if (route.size() != 5) fail(op, ": route must be (counts, tokens, dest, slot, origin), got ", route.size(), " values");
    for (size_t i = 0; i < 5; ++i) args_.emplace_back(op, names[i], py::object(route[i]));
  }
  EpRoute operator*() const { return {*args_[0], *args_[1], *args_[2], *args_[3], *args_[4]}; }

 private:
  std::vector<Arg> args_;
};

std::unique_ptr<SharedMemory> make_memory(int rank, int world, int64_t data_bytes, double timeout_s,
                                          const py::function& all_gather) {
  return std::make_unique<SharedMemory>(rank, world, data_bytes, timeout_s, [&](const std::string& mine) {
    return all_gather(py::bytes(mine)).cast<std::vector<std::string>>();
  });
}

void ep_prepare(py::handle topk_idx, const SharedMemory& memory, py::handle counts, py::handle tokens, py::handle dest,
                py::handle slot, py::handle offsets, int num_threads) {
  const char* op = "ep_prepare";
  Arg i(op, "topk_idx", topk_idx), c(op, "counts", counts), n(op, "tokens", tokens), d(op, "dest", dest),
      s(op, "slot", slot), o(op, "offsets", offsets);
  py::gil_scoped_release nogil;
  xt::ep_prepare(*i, memory.peers(), *c, *n, *d, *s, *o, stream_of(i, num_threads));
}

void ep_prepare_rows(const SharedMemory& memory, py::handle counts, py::handle tokens, py::handle offsets,
                     py::handle origin, int num_threads) {
  const char* op = "ep_prepare_rows";
  Arg c(op, "counts", counts), n(op, "tokens", tokens), o(op, "offsets", offsets), r(op, "origin", origin);
  py::gil_scoped_release nogil;
  xt::ep_prepare_rows(memory.peers(), *c, *n, *o, *r, stream_of(c, num_threads));
}

int64_t ep_room(py::handle counts, py::handle tokens, int64_t row_bytes) {
  Arg c("ep_room", "counts", counts), n("ep_room", "tokens", tokens);
  return xt::ep_room(*c, *n, row_bytes);
}

void ep_dispatch(py::handle x, py::handle scales, const py::sequence& route, const SharedMemory& memory, py::handle out,
                 py::handle out_scales, int num_threads) {
  const char* op = "ep_dispatch";
  Arg a(op, "x", x), o(op, "out", out);
  OptionalArg s(op, "scales", scales), os(op, "out_scales", out_scales);
  RouteArg r(op, route);
  py::gil_scoped_release nogil;
  xt::ep_dispatch(*a, s.get(), *r, memory.peers(), *o, os.get(), stream_of(a, num_threads));
}

void ep_combine(py::handle y, const py::sequence& route, const SharedMemory& memory, py::handle probs, py::handle out,
                int num_threads) {
  const char* op = "ep_combine";
  Arg a(op, "y", y), o(op, "out", out);
  OptionalArg p(op, "probs", probs);
  RouteArg r(op, route);
  py::gil_scoped_release nogil;
  xt::ep_combine(*a, *r, memory.peers(), p.get(), *o, stream_of(a, num_threads));
}

void ep_combine_bwd(py::handle dout, py::handle y, const py::sequence& route, const SharedMemory& memory,
                    py::handle probs, py::handle dy, py::handle dprobs, int num_threads) {
  const char* op = "ep_combine_bwd";
  Arg g(op, "dout", dout), a(op, "y", y), p(op, "probs", probs), d(op, "dy", dy), dp(op, "dprobs", dprobs);
  RouteArg r(op, route);
  py::gil_scoped_release nogil;
  xt::ep_combine_bwd(*g, *a, *r, memory.peers(), *p, *d, *dp, stream_of(g, num_threads));
}

}  // namespace

void bind_ep(py::module_& m) {
  using namespace py::literals;
  py::class_<SharedMemory>(m, "SharedMemory")
      .def(py::init(&make_memory), "rank"_a, "world"_a, "data_bytes"_a, "timeout_s"_a, "all_gather"_a)
      .def_property_readonly("data_bytes", [](const SharedMemory& memory) { return memory.peers().data_bytes; });
  m.def("ep_prepare", &ep_prepare, "topk_idx"_a, "memory"_a, "counts"_a, "tokens"_a, "dest"_a, "slot"_a, "offsets"_a,
        "num_threads"_a);
  m.def("ep_prepare_rows", &ep_prepare_rows, "memory"_a, "counts"_a, "tokens"_a, "offsets"_a, "origin"_a,
        "num_threads"_a);
  m.def("ep_room", &ep_room, "counts"_a, "tokens"_a, "row_bytes"_a);
  m.def("ep_dispatch", &ep_dispatch, "x"_a, "scales"_a, "route"_a, "memory"_a, "out"_a, "out_scales"_a,
        "num_threads"_a);
  m.def("ep_combine", &ep_combine, "y"_a, "route"_a, "memory"_a, "probs"_a, "out"_a, "num_threads"_a);
  m.def("ep_combine_bwd", &ep_combine_bwd, "dout"_a, "y"_a, "route"_a, "memory"_a, "probs"_a, "dy"_a, "dprobs"_a,
        "num_threads"_a);
}

}  // namespace xt::python
