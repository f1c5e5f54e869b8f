#include "xtuner/device_fault.h"

namespace xt {

// "ep_dispatch: exchange 7: rank 3"
static std::string other_rank(uint64_t index) {
  const char* ops[] = {"ep_prepare", "ep_dispatch", "ep_combine", "ep_combine_bwd"};
  return std::string(ops[((index >> 40) - 1) & 3]) + ": exchange " + std::to_string(index & 0xffffffffu) + ": rank " +
         std::to_string(index >> 32 & 0xff);
}

std::string describe_fault(uint64_t word) {
  const uint64_t value = word & ((uint64_t{1} << 56) - 1);
  const std::string index = std::to_string(value);
  switch (static_cast<Fault>(word >> 56)) {
    case Fault::route_map_index: return "route_map: topk_idx (flat index " + index + ") must be in [-1, E)";
    case Fault::route_map_capacity: return "route_map: src has too few rows, the routing needs " + index;
    case Fault::permute_maps:
      return "permute: src and row_of must be each other's inverse, but differ at index " + index;
    case Fault::unpermute_row_of: return "unpermute: row_of (flat index " + index + ") must be in [-1, R)";
    case Fault::unpermute_bwd_maps:
      return "unpermute_bwd: src and row_of must be each other's inverse, but differ at index " + index;
    case Fault::offsets: return "offsets[E] must be in [0, R], got " + index;
    case Fault::offsets_order: return "offsets must ascend from 0, but those of expert " + index + " do not";
    case Fault::gemm_src: return "src[" + index + "] must be -1 or a choice of one of the tokens";
    case Fault::ep_timeout: return other_rank(value) + " did not come within the group's timeout_s";
    case Fault::ep_gave_up: return other_rank(value) + " had given up";
    case Fault::ep_order:
      return other_rank(value) + " was in another op: all ranks must call the same ops in the same order";
    case Fault::ep_rows: return "ep_prepare: a rank would get " + index + " rows; at most 2^31 - 1 are possible";
    case Fault::ep_dest: return "ep: dest (choice " + index + ") must be a rank and a row of it, or (-1, -1)";
    case Fault::gemm_columns:
      return "gemm_k_grouped_fp8: the padded rows of expert " + index + " end past the P columns there are";
    default: return "not a fault: " + std::to_string(word);
  }
}

}  // namespace xt
