#include "cuda/cuda.h"
#include "cuda/gemm_fp8.h"
#include "cuda/gemm_paths.h"

namespace xt::cuda {

void gemm_m_grouped_fp8(const Tensor& a, const Tensor& scale_a, const Tensor& b, const Tensor& scale_b,
                        const Tensor& offsets, const Tensor& out, Stream stream) {
  const char* op = "gemm_m_grouped_fp8";
  const OnDevice guard(op, a);
  if (out.numel() == 0) return;
  const Epilogue epilogue = {out.data, out.dtype == DType::f32, out.shape[1], false, nullptr, nullptr, Swiglu({})};
  const MGroupedFp8 g = {a.data,
                         b.data,
                         a.dtype,
                         b.dtype,
                         scale_a.ptr<float>(),
                         scale_b.ptr<float>(),
                         scale_a.shape[1],
                         scale_b.strides[0],
                         scale_b.strides[1],
                         scale_b.strides[2],
                         offsets.ptr<int64_t>(),
                         b.shape[0],
                         out.shape[0],
                         out.shape[1],
                         a.shape[1],
                         epilogue,
                         stream.fault};
#ifdef XT_CUDA_SM90
  const bool tiles = g.experts > 0 && g.k > 0 && g.scale_a_ld % 4 == 0 && fits_int32({g.rows, g.n, g.k, g.experts});
  if (tiles && is_hopper(op, a)) return sm90::gemm_m_grouped_fp8(g, multiprocessors(op, a), stream);
#endif
  simple_m_grouped_fp8(g, stream);
}

}  // namespace xt::cuda
