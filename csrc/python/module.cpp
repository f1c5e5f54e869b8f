// xtuner._C: the core's functions under their own names. Every call checks its arguments, then runs without the GIL.
#include <pybind11/stl.h>

#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/build_info.h"
#include "xtuner/device_fault.h"
#include "xtuner/host_memory.h"

namespace xt::python {
namespace {

py::dict build_info() {
  const BuildInfo info = xt::build_info();
  py::dict backends, d;
  backends["cpu"] = info.cpu;
  backends["cuda"] = info.cuda;
  backends["ascend"] = info.ascend;
  d["version"] = info.version;
  d["compiler"] = info.compiler;
  d["backends"] = backends;
  d["isa"] = info.isa;
  d["isas"] = info.isas;
  return d;
}

void force_isa(const std::optional<std::string>& name) { xt::force_isa(name.value_or("")); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "Compiled kernels of xtuner. Shapes, dtypes and meaning: csrc/include/xtuner/ops/*.h; use xtuner.ops.";
  py::register_exception<Error>(m, "Error", PyExc_ValueError);
  m.def("init_exchange", &init_exchange, "tensor_type"_a, "use_table"_a = true);
  m.def("build_info", &build_info);
  m.def("watch_faults", &watch_faults, "word"_a);
  m.def("describe_fault", [](int64_t word) { return describe_fault(static_cast<uint64_t>(word)); }, "word"_a);
  m.def("force_isa", &force_isa, "name"_a);
  m.def("keep_freed_memory", &keep_freed_memory);
  bind_attention(m);
  bind_fp8(m);
  bind_ep(m);
  bind_loss(m);
  bind_moe(m);
  bind_norm_rope(m);
}

}  // namespace xt::python
