#include <limits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

char* address(const Tensor& t, int64_t element) { return t.ptr<char>() + element * size_of(t.dtype); }

// Tiles are whole panels wide, however the columns are shared out: one partial sum per row and panel.
int64_t panels(int64_t width) { return (width + kernels().tile_cols - 1) / kernels().tile_cols; }

// Adds up each row's partial sums in their order.
void sum_panels(const Tensor& workspace, const Tensor& dweights, int64_t used, int64_t width, int num_threads) {
  const int64_t count = panels(width);
  float* out = dweights.ptr<float>();
  parallel_ranges(num_threads, dweights.shape[0], rows_per_task(4 * count), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* part = workspace.ptr<float>() + r * count;
      float sum = 0;
      for (int64_t i = 0; i < count && r < used; ++i) sum += part[i];
      out[r] = sum;
    }
  });
}

}  // namespace

int64_t gemm_m_grouped_dswiglu_workspace_size(int64_t rows, int64_t width) { return rows * panels(width); }

void gemm_m_grouped_dswiglu(const Tensor& dy, const Tensor& b, const Tensor& offsets, const Tensor& x,
                            const DswigluOptions& options, const Tensor& dx, const Tensor& act, int num_threads) {
  const int64_t num_rows = dy.shape[0], num_k = dy.shape[1], width = act.shape[1];
  const int64_t used = used_rows("gemm_m_grouped_dswiglu", offsets, num_rows);
  std::vector<GemmProblem> problems;
  const int64_t* at = offsets.ptr<int64_t>();
  for (int64_t e = 0; e < b.shape[0]; ++e) {
    const int64_t first = at[e], rows = at[e + 1] - first;
    if (rows == 0 || width == 0) continue;
    const GemmSide q = {address(dy, first * num_k), dy.dtype, num_k, 1};
    const GemmSide v = {address(b, e * num_k * width), b.dtype, 1, width};
    // The product goes where the gradient of gate will be, and is replaced by it while it is in cache.
    const GemmOut out = {address(dx, first * 2 * width), dx.dtype, 2 * width, 1, false};
    GemmEpilogue epilogue;
    epilogue.gate_up = address(x, first * 2 * width);
    epilogue.act = address(act, first * width);
    epilogue.act_row = width;
    if (options.weights) {
      epilogue.weights = options.weights->ptr<float>() + first;
      epilogue.dots = options.workspace->ptr<float>() + first * panels(width);
    }
    epilogue.alpha = static_cast<float>(options.swiglu.alpha);
    epilogue.limit = static_cast<float>(options.swiglu.limit.value_or(std::numeric_limits<double>::infinity()));
    epilogue.up_offset = static_cast<float>(options.swiglu.up_offset);
    problems.push_back({q, v, out, rows, width, num_k, epilogue});
  }
  run_gemms(problems, num_threads);
  zero_rows(dx, used, num_rows, num_threads);
  zero_rows(act, used, num_rows, num_threads);
  if (options.weights) sum_panels(*options.workspace, *options.dweights, used, width, num_threads);
}

}  // namespace xt::cpu
