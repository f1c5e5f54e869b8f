// float8: quantization and back, grouped products.
#include <pybind11/stl.h>

#include "bind.h"
#include "tensor_caster.h"
#include "xtuner/ops/gemm_k_grouped_fp8.h"
#include "xtuner/ops/gemm_m_grouped_fp8.h"
#include "xtuner/ops/quantize.h"

namespace xt::python {
namespace {

void quantize_1x128(py::handle x, py::handle offsets, bool power_of_two, double eps, py::handle q, py::handle scale,
                    int num_threads) {
  const char* op = "quantize_1x128";
  Arg a(op, "x", x), codes(op, "q", q), s(op, "scale", scale);
  OptionalArg o(op, "offsets", offsets);
  py::gil_scoped_release nogil;
  xt::quantize_1x128(*a, o.get(), {power_of_two, eps}, *codes, *s, stream_of(a, num_threads));
}

void quantize_128x128(py::handle w, bool power_of_two, double eps, py::handle q, py::handle qt, py::handle scale,
                      int num_threads) {
  const char* op = "quantize_128x128";
  Arg a(op, "w", w), codes(op, "q", q), turned(op, "qt", qt), s(op, "scale", scale);
  py::gil_scoped_release nogil;
  xt::quantize_128x128(*a, {power_of_two, eps}, *codes, *turned, *s, stream_of(a, num_threads));
}

void quantize_rowcol(py::handle x, py::handle offsets, bool power_of_two, double eps, py::handle q, py::handle scale,
                     py::handle qt, py::handle scale_t, int num_threads) {
  const char* op = "quantize_rowcol";
  Arg a(op, "x", x), o(op, "offsets", offsets), codes(op, "q", q), s(op, "scale", scale), turned(op, "qt", qt),
      st(op, "scale_t", scale_t);
  py::gil_scoped_release nogil;
  xt::quantize_rowcol(*a, *o, {power_of_two, eps}, *codes, *s, *turned, *st, stream_of(a, num_threads));
}

void permute_quantize_rowcol(py::handle x, py::handle src, int64_t num_experts_per_tok, py::handle offsets,
                             bool power_of_two, double eps, py::handle q, py::handle scale, py::handle qt,
                             py::handle scale_t, int num_threads) {
  const char* op = "permute_quantize_rowcol";
  Arg a(op, "x", x), m(op, "src", src), o(op, "offsets", offsets), codes(op, "q", q), s(op, "scale", scale),
      turned(op, "qt", qt), st(op, "scale_t", scale_t);
  py::gil_scoped_release nogil;
  xt::permute_quantize_rowcol(*a, *m, num_experts_per_tok, *o, {power_of_two, eps}, *codes, *s, *turned, *st,
                              stream_of(a, num_threads));
}

void swiglu_quantize_rowcol(py::handle x, py::handle offsets, double alpha, std::optional<double> limit,
                            double up_offset, bool power_of_two, double eps, py::handle q, py::handle scale,
                            py::handle qt, py::handle scale_t, int num_threads) {
  const char* op = "swiglu_quantize_rowcol";
  Arg a(op, "x", x), o(op, "offsets", offsets), codes(op, "q", q), s(op, "scale", scale), turned(op, "qt", qt),
      st(op, "scale_t", scale_t);
  py::gil_scoped_release nogil;
  xt::swiglu_quantize_rowcol(*a, *o, {alpha, limit, up_offset}, {power_of_two, eps}, *codes, *s, *turned, *st,
                             stream_of(a, num_threads));
}

void dequantize(py::handle q, py::handle scale, py::handle out, int num_threads) {
  const char* op = "dequantize";
  Arg codes(op, "q", q), s(op, "scale", scale), o(op, "out", out);
  py::gil_scoped_release nogil;
  xt::dequantize(*codes, *s, *o, stream_of(codes, num_threads));
}

void gemm_m_grouped_fp8(py::handle a, py::handle scale_a, py::handle b, py::handle scale_b, py::handle offsets,
                        py::handle out, int num_threads) {
  const char* op = "gemm_m_grouped_fp8";
  Arg ta(op, "a", a), sa(op, "scale_a", scale_a), tb(op, "b", b), sb(op, "scale_b", scale_b);
  Arg to(op, "offsets", offsets), tc(op, "out", out);
  py::gil_scoped_release nogil;
  xt::gemm_m_grouped_fp8(*ta, *sa, *tb, *sb, *to, *tc, stream_of(ta, num_threads));
}

void gemm_k_grouped_fp8(py::handle a, py::handle scale_a, py::handle b, py::handle scale_b, py::handle offsets,
                        double beta, py::handle out, int num_threads) {
  const char* op = "gemm_k_grouped_fp8";
  Arg ta(op, "a", a), sa(op, "scale_a", scale_a), tb(op, "b", b), sb(op, "scale_b", scale_b);
  Arg to(op, "offsets", offsets), tc(op, "out", out);
  py::gil_scoped_release nogil;
  xt::gemm_k_grouped_fp8(*ta, *sa, *tb, *sb, *to, beta, *tc, stream_of(ta, num_threads));
}

}  // namespace

void bind_fp8(py::module_& m) {
  using namespace py::literals;
  m.def("quantize_1x128", &quantize_1x128, "x"_a, "offsets"_a, "power_of_two"_a, "eps"_a, "q"_a, "scale"_a,
        "num_threads"_a);
  m.def("quantize_128x128", &quantize_128x128, "w"_a, "power_of_two"_a, "eps"_a, "q"_a, "qt"_a, "scale"_a,
        "num_threads"_a);
  m.def("quantize_rowcol", &quantize_rowcol, "x"_a, "offsets"_a, "power_of_two"_a, "eps"_a, "q"_a, "scale"_a, "qt"_a,
        "scale_t"_a, "num_threads"_a);
  m.def("permute_quantize_rowcol", &permute_quantize_rowcol, "x"_a, "src"_a, "num_experts_per_tok"_a, "offsets"_a,
        "power_of_two"_a, "eps"_a, "q"_a, "scale"_a, "qt"_a, "scale_t"_a, "num_threads"_a);
  m.def("swiglu_quantize_rowcol", &swiglu_quantize_rowcol, "x"_a, "offsets"_a, "alpha"_a, "limit"_a, "up_offset"_a,
        "power_of_two"_a, "eps"_a, "q"_a, "scale"_a, "qt"_a, "scale_t"_a, "num_threads"_a);
  m.def("gemm_m_grouped_fp8", &gemm_m_grouped_fp8, "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "offsets"_a, "out"_a,
        "num_threads"_a);
  m.def("gemm_k_grouped_fp8", &gemm_k_grouped_fp8, "a"_a, "scale_a"_a, "b"_a, "scale_b"_a, "offsets"_a, "beta"_a,
        "out"_a, "num_threads"_a);
  m.def("dequantize", &dequantize, "q"_a, "scale"_a, "out"_a, "num_threads"_a);
}

}  // namespace xt::python
