#include "cuda/cuda.h"
#include "cuda/gemm_paths.h"
#include "cuda/row_math.h"

namespace xt::cuda {
namespace {

// A warp per row, whose `act` holds the gradient of the activation.
template <class T, int N>
__global__ void __launch_bounds__(block_threads)
    dswiglu_kernel(const typename Access<T, N>::Bits* __restrict__ x, UsedRows used_rows, Swiglu f,
                   const float* __restrict__ weights, typename Access<T, N>::Bits* __restrict__ dx,
                   typename Access<T, N>::Bits* __restrict__ act, float* __restrict__ dweights, int64_t units,
                   uint64_t* fault) {
  using A = Access<T, N>;
  const int64_t used = used_rows.get(fault);
  for (int64_t r = grid_warp(); r < used_rows.rows; r += grid_warps()) {
    const bool live = r < used;
    const float weight = live && weights ? __ldg(weights + r) : 1.0f;
    float dot = 0;
    for (int64_t i = lane(); i < units; i += warp_size) {
      const int64_t at_gate = r * 2 * units + i, at_up = at_gate + units, at_act = r * units + i;
      float d[N] = {}, g[N] = {}, u[N] = {};
      if (live) {
        A::widen(act[at_act], d);
        A::widen(__ldg(x + at_gate), g);
        A::widen(__ldg(x + at_up), u);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float dg = 0, du = 0, a = 0;
        if (live) f.backward(weight * d[n], g[n], u[n], dg, du, a);
        dot = fmaf(d[n], a, dot);
        g[n] = dg;
        u[n] = du;
        d[n] = weight * a;
      }
      dx[at_gate] = A::narrow(g);
      dx[at_up] = A::narrow(u);
      act[at_act] = A::narrow(d);
    }
    dot = warp_sum(dot);
    if (dweights && lane() == 0) dweights[r] = dot;
  }
}

// A thread per row adds up its parts in their order.
__global__ void __launch_bounds__(block_threads)
    sum_parts_kernel(const float* __restrict__ parts, int64_t count, UsedRows used_rows, float* __restrict__ sums,
                     uint64_t* fault) {
  const int64_t used = used_rows.get(fault), step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r < used_rows.rows; r += step) {
    float sum = 0;
    for (int64_t i = 0; i < count && r < used; ++i) sum += __ldg(parts + r * count + i);
    sums[r] = sum;
  }
}

// The product goes to act, then row by row what becomes of it.
void by_rows(const char* op, MGrouped g, const Tensor& x, const UsedRows& used, const DswigluOptions& options,
             const Tensor& dx, const Tensor& act, Stream stream) {
  g.epilogue = {act.data, act.dtype == DType::f32, g.n, false, nullptr, nullptr, Swiglu({})};
  if (g.n > 0) simple_m_grouped(g, act.dtype, stream);
  with_access(x.dtype, g.n, [&](auto element, auto n) {
    using T = decltype(element);
    using Unit = typename Access<T, n()>::Bits;
    launch(op, stream, blocks_of_warps(g.rows), block_threads, dswiglu_kernel<T, n()>, x.ptr<Unit>(), used,
           Swiglu(options.swiglu), options.weights ? options.weights->ptr<float>() : nullptr, dx.ptr<Unit>(),
           act.ptr<Unit>(), options.dweights ? options.dweights->ptr<float>() : nullptr, g.n / n(), stream.fault);
  });
}

}  // namespace

int64_t gemm_m_grouped_dswiglu_workspace_size(int64_t rows, int64_t width) {
  return rows * ceil_div(width, std::min(sm80::dot_columns, sm90::dot_columns));
}

void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x,
                            const DswigluOptions& options, const Tensor& dx, const Tensor& act, Stream stream) {
  const char* op = "gemm_m_grouped_dswiglu";
  const OnDevice guard(op, dy);
  const int64_t rows = dy.shape[0], width = act.shape[1];
  if (rows == 0) return;
  Epilogue epilogue = {dx.data, false, 2 * width, false, nullptr, act.data, Swiglu(options.swiglu), x.data};
  if (options.weights) {
    epilogue.weights = options.weights->ptr<float>();
    epilogue.dots = options.workspace->ptr<float>();
  }
  MGrouped g = {dy.data,     b.data, offsets.ptr<int64_t>(), b.shape[0], rows, width,
                dy.shape[1], false,  RowMap(),               epilogue,   stream.fault};
  const UsedRows used(&offsets, rows);
  const bool units = g.k % 8 == 0 && width % 8 == 0 && width > 0 && fits_int32({2 * width});
  switch (gemm_path(op, dy, units, g.experts > 0 && fits_int32({rows, g.k, g.experts}))) {
#ifdef XT_CUDA_SM90
    case GemmPath::sm90:
      g.epilogue.dot_parts = ceil_div(width, sm90::dot_columns);
      sm90::gemm_m_grouped_dswiglu(g, multiprocessors(op, dy), stream);
      break;
#endif
    case GemmPath::sm80:
      g.epilogue.dot_parts = ceil_div(width, sm80::dot_columns);
      sm80::gemm_m_grouped_dswiglu(g, multiprocessors(op, dy), stream);
      break;
    case GemmPath::simple: return by_rows(op, g, x, used, options, dx, act, stream);
  }
  if (!options.weights) return;
  launch(op, stream, ceil_div(rows, block_threads), block_threads, sum_parts_kernel, g.epilogue.dots,
         g.epilogue.dot_parts, used, options.dweights->ptr<float>(), stream.fault);
}

}  // namespace xt::cuda
