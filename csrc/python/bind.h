// One function per family of ops, each in its own file, adds that family to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace xt::python {

void bind_attention(pybind11::module_& m);
void bind_fp8(pybind11::module_& m);
void bind_ep(pybind11::module_& m);
void bind_loss(pybind11::module_& m);
void bind_moe(pybind11::module_& m);
void bind_norm_rope(pybind11::module_& m);

}  // namespace xt::python
