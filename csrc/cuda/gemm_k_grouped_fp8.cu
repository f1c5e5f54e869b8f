#include "cuda/cuda.h"
#include "cuda/gemm_fp8.h"
#include "cuda/gemm_paths.h"

namespace xt::cuda {

void gemm_k_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, bool accumulate, const Tensor& out, Stream stream) {
  const char* op = "gemm_k_grouped_fp8";
  const OnDevice guard(op, a);
  if (out.numel() == 0) return;
  const Epilogue epilogue = {out.data, out.dtype == DType::f32, out.shape[2], accumulate, nullptr, nullptr, Swiglu({})};
  const KGroupedFp8 g = {a.data,
                         b.data,
                         a.dtype,
                         b.dtype,
                         scale_a.ptr<float>(),
                         scale_b.ptr<float>(),
                         offsets.ptr<int64_t>(),
                         out.shape[0],
                         a.shape[1],
                         out.shape[1],
                         out.shape[2],
                         epilogue,
                         stream.fault};
#ifdef XT_CUDA_SM90
  const bool tiles = g.columns > 0 && fits_int32({g.columns, g.m, g.n, g.experts});
  if (tiles && is_hopper(op, a)) return sm90::gemm_k_grouped_fp8(g, multiprocessors(op, a), stream);
#endif
  simple_k_grouped_fp8(g, stream);
}

}  // namespace xt::cuda
