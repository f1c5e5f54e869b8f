#include "xtuner/ops/route_map.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/checks.h"

namespace xt {

int64_t route_map_workspace_size(int64_t num_choices, int64_t num_experts, DeviceType device) {
#ifdef XT_CUDA
  if (device == DeviceType::cuda) return cuda::route_map_workspace_size(num_choices, num_experts);
#endif
  static_cast<void>(num_choices), static_cast<void>(num_experts), static_cast<void>(device);
  return 0;
}

void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, Stream stream, const Tensor* workspace) {
  ArgChecker check("route_map");
  check.tensor("topk_idx", topk_idx, {DType::i32, DType::i64}, {{"T"}, {"K"}});
  check.tensor("counts", counts, {DType::i32}, {{"E"}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1", counts.shape[0] + 1}});
  check.tensor("row_of", row_of, {DType::i32}, {{"T", topk_idx.shape[0]}, {"K", topk_idx.shape[1]}});
  check.tensor("src", src, {DType::i32}, {{"R"}});
  check.require(align >= 1, "align must be at least 1, got ", align);
  check.require(topk_idx.numel() < (int64_t{1} << 31), "T*K must be below 2^31, got ", topk_idx.numel());
  check.require(src.numel() < (int64_t{1} << 31), "R must be below 2^31, got ", src.numel());
  check.require(counts.numel() < (int64_t{1} << 30), "E must be below 2^30, got ", counts.numel());
  const int64_t work = route_map_workspace_size(topk_idx.numel(), counts.shape[0], check.device().type);
  if (workspace) check.tensor("workspace", *workspace, {DType::i32}, {{"W"}});
  const int64_t given = workspace ? workspace->numel() : 0;
  check.require(given >= work, "workspace must hold at least ", work, " values (route_map_workspace_size), got ", given);
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::route_map(topk_idx, align, counts, offsets, row_of, src, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda: return cuda::route_map(topk_idx, align, counts, offsets, row_of, src, workspace, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
