#include "xtuner/ops/route_map.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {

void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, Stream stream) {
  ArgChecker check("route_map");
  check.tensor("topk_idx", topk_idx, {DType::i32, DType::i64}, {{"T"}, {"K"}});
  check.tensor("counts", counts, {DType::i32}, {{"E"}});
  check.tensor("offsets", offsets, {DType::i64}, {{"E+1", counts.shape[0] + 1}});
  check.tensor("row_of", row_of, {DType::i32}, {{"T", topk_idx.shape[0]}, {"K", topk_idx.shape[1]}});
  check.tensor("src", src, {DType::i32}, {{"R"}});
  check.require(align >= 1, "align must be at least 1, got ", align);
  check.require(topk_idx.numel() < (int64_t{1} << 31), "T*K must be below 2^31, got ", topk_idx.numel());
  check.require(src.numel() < (int64_t{1} << 31), "R must be below 2^31, got ", src.numel());
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::route_map(topk_idx, align, counts, offsets, row_of, src, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
