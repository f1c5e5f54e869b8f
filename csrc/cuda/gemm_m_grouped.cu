#include "cuda/cuda.h"
#include "cuda/gemm_paths.h"

namespace xt::cuda {

void gemm_m_grouped(const Tensor& a, const Tensor& b, const Tensor& offsets, bool trans_b,
                    const GemmMGroupedOptions& options, const Tensor& out, Stream stream) {
  const char* op = "gemm_m_grouped";
  const OnDevice guard(op, a);
  if (out.numel() == 0) return;
  const Epilogue epilogue = {out.data, out.dtype == DType::f32, out.shape[1], false,
                             options.bias ? options.bias->data : nullptr, options.act ? options.act->data : nullptr,
                             Swiglu(options.swiglu)};
  const RowMap map = RowMap::of(options.gather, a.shape[0]);
  const MGrouped g = {a.data,       b.data,  offsets.ptr<int64_t>(), b.shape[0], out.shape[0], out.shape[1],
                      a.shape[1], trans_b, map,                    epilogue,   stream.fault};
  const int64_t n_run = options.act ? g.n / 2 : g.n;  // neighbouring columns of b and of the output
  const bool units = g.k % 8 == 0 && n_run % 8 == 0 && fits_int32({g.n});
  switch (gemm_path(op, a, units, g.experts > 0 && g.k > 0 && fits_int32({g.rows, g.k, g.experts}))) {
#ifdef XT_CUDA_SM90
    case GemmPath::sm90: return sm90::gemm_m_grouped(g, multiprocessors(op, a), stream);
#endif
    case GemmPath::sm80: return sm80::gemm_m_grouped(g, multiprocessors(op, a), stream);
    case GemmPath::simple:
      simple_m_grouped(g, a.dtype, stream);
      if (options.act) cuda::swiglu(out, &offsets, options.swiglu, *options.act, stream);
  }
}

}  // namespace xt::cuda
