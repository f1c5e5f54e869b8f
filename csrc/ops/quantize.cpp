#include "xtuner/ops/quantize.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {
namespace {

void check_params(const ArgChecker& check, QuantizeParams params) {
  check.require(params.eps >= 1e-30 && params.eps <= 1, "eps must be in [1e-30, 1], got ", params.eps);
}

// The arguments of quantize_rowcol and its kin but x; rows [R, H] are what is quantized.
void check_rowcol(ArgChecker& check, int64_t r, int64_t h, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                  const Tensor& scale, const Tensor& qt, const Tensor& scale_t) {
  check.fp8_dim("H", h);
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1"}});
  check.require(offsets.shape[0] >= 1, "offsets must hold E+1 values, got none");
  check_params(check, params);
  const int64_t p = padded_rows(r, offsets.shape[0] - 1);
  check.tensor("q", q, fp8_dtypes, {{"R", r}, {"H", h}});
  check.tensor("scale", scale, {DType::f32}, {{"H/128", h / 128}, {"ld", row_scale_ld(r)}});
  check.tensor("qt", qt, {q.dtype}, {{"H", h}, {"P", p}});
  check.tensor("scale_t", scale_t, {DType::f32}, {{"P/128", p / 128}, {"H", h}});
}

}  // namespace

void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    Stream stream) {
  ArgChecker check("quantize_1x128");
  check.tensor("x", x, data_dtypes, {{"R"}, {"H"}});
  const int64_t r = x.shape[0], h = x.shape[1];
  check.fp8_dim("H", h);
  if (offsets) {
    check.tensor("offsets", *offsets, {DType::i64}, {{"E+1"}});
    check.require(offsets->shape[0] >= 1, "offsets must hold E+1 values, got none");
  }
  check_params(check, params);
  check.tensor("q", q, fp8_dtypes, {{"R", r}, {"H", h}});
  check.tensor("scale", scale, {DType::f32}, {{"H/128", h / 128}, {"ld", row_scale_ld(r)}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::quantize_1x128(x, offsets, params, q, scale, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::quantize_1x128(x, offsets, params, q, scale, stream);
#endif
    default: check.no_kernel();
  }
}

void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      Stream stream) {
  ArgChecker check("quantize_128x128");
  check.tensor("w", w, data_dtypes, {{"E"}, {"N"}, {"K"}});
  const int64_t n = w.shape[1], k = w.shape[2];
  const Dim experts = {"E", w.shape[0]};
  check.fp8_dim("N", n);
  check.fp8_dim("K", k);
  check_params(check, params);
  check.tensor("q", q, fp8_dtypes, {experts, {"N", n}, {"K", k}});
  check.tensor("qt", qt, {q.dtype}, {experts, {"K", k}, {"N", n}});
  check.tensor("scale", scale, {DType::f32}, {experts, {"N/128", n / 128}, {"K/128", k / 128}});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::quantize_128x128(w, params, q, qt, scale, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::quantize_128x128(w, params, q, qt, scale, stream);
#endif
    default: check.no_kernel();
  }
}

void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, Stream stream) {
  ArgChecker check("quantize_rowcol");
  check.tensor("x", x, data_dtypes, {{"R"}, {"H"}});
  check_rowcol(check, x.shape[0], x.shape[1], offsets, params, q, scale, qt, scale_t);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::quantize_rowcol(x, offsets, params, q, scale, qt, scale_t, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::quantize_rowcol(x, offsets, params, q, scale, qt, scale_t, stream);
#endif
    default: check.no_kernel();
  }
}

void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, Stream stream) {
  ArgChecker check("permute_quantize_rowcol");
  check.tensor("x", x, data_dtypes, {{"T"}, {"H"}});
  check.tensor("src", src, {DType::i32}, {{"R"}});
  check.require(num_experts_per_tok >= 1, "num_experts_per_tok must be at least 1, got ", num_experts_per_tok);
  check_rowcol(check, src.shape[0], x.shape[1], offsets, params, q, scale, qt, scale_t);
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::permute_quantize_rowcol(x, src, num_experts_per_tok, offsets, params, q, scale, qt, scale_t,
                                          stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda:
      return cuda::permute_quantize_rowcol(x, src, num_experts_per_tok, offsets, params, q, scale, qt, scale_t, stream);
#endif
    default: check.no_kernel();
  }
}

void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            Stream stream) {
  ArgChecker check("swiglu_quantize_rowcol");
  check.tensor("x", x, data_dtypes, {{"R"}, {"2H"}});
  check.require(x.shape[1] % 2 == 0, "x must have an even number of columns (gate, then up), got ", x.shape[1]);
  check_rowcol(check, x.shape[0], x.shape[1] / 2, offsets, params, q, scale, qt, scale_t);
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::swiglu_quantize_rowcol(x, offsets, swiglu, params, q, scale, qt, scale_t, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda:
      return cuda::swiglu_quantize_rowcol(x, offsets, swiglu, params, q, scale, qt, scale_t, stream);
#endif
    default: check.no_kernel();
  }
}

void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, Stream stream) {
  ArgChecker check("dequantize");
  if (q.ndim == 3) {
    check.tensor("q", q, fp8_dtypes, {{"E"}, {"N"}, {"K"}});
    const Dim experts = {"E", q.shape[0]}, n = {"N", q.shape[1]}, k = {"K", q.shape[2]};
    check.fp8_dim("N", n.size);
    check.fp8_dim("K", k.size);
    check.tensor("scale", scale, {DType::f32}, {experts, {"N/128", n.size / 128}, {"K/128", k.size / 128}});
    check.tensor("out", out, data_dtypes, {experts, n, k});
  } else {
    check.tensor("q", q, fp8_dtypes, {{"R"}, {"H"}});
    const Dim rows = {"R", q.shape[0]}, h = {"H", q.shape[1]};
    check.fp8_dim("H", h.size);
    check.tensor("scale", scale, {DType::f32}, {{"H/128", h.size / 128}, {"ld"}});
    check.require(scale.shape[1] >= rows.size, "scale must have a column for each of the R=", rows.size, " rows, got ",
                  scale.shape[1]);
    check.tensor("out", out, data_dtypes, {rows, h});
  }
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::dequantize(q, scale, out, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::dequantize(q, scale, out, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
