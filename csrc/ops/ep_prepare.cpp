#include "xtuner/ops/ep_prepare.h"

#include "cpu/cpu.h"
#include "ops/ep_checks.h"

namespace xt {

void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts, const Tensor& dest,
                const Tensor& offsets, Stream stream) {
  ArgChecker check("ep_prepare");
  check.tensor("topk_idx", topk_idx, {DType::i32, DType::i64}, {{"T"}, {"K"}});
  check_counts(check, counts, peers);
  check.tensor("dest", dest, {DType::i32}, {{"T", topk_idx.shape[0]}, {"K", topk_idx.shape[1]}, {"2", 2}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E/W+1", counts.shape[1] / peers.world + 1}});
  check.require(topk_idx.numel() < (int64_t{1} << 31), "T*K must be below 2^31, got ", topk_idx.numel());
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::ep_prepare(topk_idx, capacity, peers, counts, dest, offsets, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
