#include "cuda/cuda.h"
#include "cuda/gemm_paths.h"

namespace xt::cuda {

void gemm_k_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool accumulate, const RowGather& gather_b,
                    const Tensor& out, Stream stream) {
  const char* op = "gemm_k_grouped";
  const OnDevice guard(op, a);
  if (out.numel() == 0) return;
  const Epilogue epilogue = {out.data, out.dtype == DType::f32, out.shape[2], accumulate, nullptr, nullptr, Swiglu({})};
  const KGrouped g = {a.data, b.data, offsets.ptr<int64_t>(), out.shape[0], a.shape[0], out.shape[1], out.shape[2],
                      RowMap::of(gather_b, b.shape[0]), epilogue, stream.fault};
  const bool units = g.m % 8 == 0 && g.n % 8 == 0 && fits_int32({g.n});
  switch (gemm_path(op, a, units, g.rows > 0 && fits_int32({g.rows, g.m, g.experts}))) {
#ifdef XT_CUDA_SM90
    case GemmPath::sm90: return sm90::gemm_k_grouped(g, multiprocessors(op, a), stream);
#endif
    case GemmPath::sm80: return sm80::gemm_k_grouped(g, multiprocessors(op, a), stream);
    case GemmPath::simple: simple_k_grouped(g, a.dtype, stream);
  }
}

}  // namespace xt::cuda
