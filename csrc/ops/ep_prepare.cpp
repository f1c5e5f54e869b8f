#include "xtuner/ops/ep_prepare.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "ops/ep_checks.h"

namespace xt {

int64_t ep_prepare_workspace_size(int64_t num_choices, int64_t num_experts, DeviceType device) {
#ifdef XT_CUDA
  if (device == DeviceType::cuda) return cuda::ep_prepare_workspace_size(num_choices, num_experts);
#endif
  static_cast<void>(num_choices), static_cast<void>(num_experts), static_cast<void>(device);
  return 0;
}

void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, Stream stream, const Tensor* workspace) {
  ArgChecker check("ep_prepare");
  check.tensor("topk_idx", topk_idx, {DType::i32, DType::i64}, {{"T"}, {"K"}});
  check_counts(check, counts, peers);
  check.tensor("dest", dest, {DType::i32}, {{"T", topk_idx.shape[0]}, {"K", topk_idx.shape[1]}, {"2", 2}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E/W+1", counts.shape[1] / peers.world + 1}});
  check.require(topk_idx.numel() < (int64_t{1} << 31), "T*K must be below 2^31, got ", topk_idx.numel());
  const int64_t work = ep_prepare_workspace_size(topk_idx.numel(), counts.shape[1], check.device().type);
  if (workspace) check.tensor("workspace", *workspace, {DType::i32}, {{"n"}});
  const int64_t given = workspace ? workspace->numel() : 0;
  check.require(given >= work, "workspace must hold at least ", work, " values (ep_prepare_workspace_size), got ", given);
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::ep_prepare(topk_idx, capacity, peers, counts, dest, offsets, stream.num_threads);
#ifdef XT_CUDA
    case DeviceType::cuda:
      check.require(counts.shape[1] * 4 <= peers.index_bytes, "the counts of E=", counts.shape[1],
                    " experts do not fit an index area of ", peers.index_bytes, " bytes");
      return cuda::ep_prepare(topk_idx, capacity, peers, counts, dest, offsets, *workspace, stream);
#endif
    default: check.no_kernel();
  }
}

}  // namespace xt
