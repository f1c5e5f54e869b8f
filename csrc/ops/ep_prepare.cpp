#include "xtuner/ops/ep_prepare.h"

#include "cpu/cpu.h"
#include "ops/ep_checks.h"

namespace xt {

void ep_prepare(const Tensor& topk_idx, const Peers& peers, const Tensor& counts, const Tensor& tokens,
                const Tensor& dest, const Tensor& slot, const Tensor& offsets, Stream stream) {
  ArgChecker check("ep_prepare");
  check.tensor("topk_idx", topk_idx, {DType::i32, DType::i64}, {{"T"}, {"K"}});
  const Dim num_tokens = {"T", topk_idx.shape[0]};
  check_loads(check, counts, tokens, peers);
  check.tensor("dest", dest, {DType::i32}, {num_tokens, {"K", topk_idx.shape[1]}, {"2", 2}});
  check.tensor("slot", slot, {DType::i32}, {num_tokens, {"W", peers.world}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E/W+1", counts.shape[1] / peers.world + 1}});
  check.require(topk_idx.numel() < (int64_t{1} << 31), "T*K must be below 2^31, got ", topk_idx.numel());
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::ep_prepare(topk_idx, peers, counts, tokens, dest, slot, offsets, stream.num_threads);
    default: check.no_kernel();
  }
}

void ep_prepare_rows(const Peers& peers, const Tensor& counts, const Tensor& tokens, const Tensor& offsets,
                     const Tensor& origin, Stream) {
  ArgChecker check("ep_prepare_rows");
  check_loads(check, counts, tokens, peers);
  check.tensor("offsets", offsets, {DType::i64}, {{"E/W+1", counts.shape[1] / peers.world + 1}});
  check.tensor("origin", origin, {DType::i32}, {{"R"}});
  check.require(origin.numel() < (int64_t{1} << 31), "R must be below 2^31, got ", origin.numel());
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::ep_prepare_rows(peers, counts, tokens, offsets, origin);
    default: check.no_kernel();
  }
}

int64_t ep_room(const Tensor& counts, const Tensor& tokens, int64_t row_bytes) {
  ArgChecker check("ep_room");
  check.tensor("counts", counts, {DType::i32}, {{"W"}, {"E"}});
  check.tensor("tokens", tokens, {DType::i32}, {{"W", counts.shape[0]}, {"W", counts.shape[0]}});
  check.require(counts.shape[0] > 0 && counts.shape[1] % counts.shape[0] == 0,
                "counts must be [W, E] with E a multiple of W, got ", describe(counts));
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::ep_room(counts, tokens, row_bytes);
    default: check.no_kernel();
  }
}

}  // namespace xt
