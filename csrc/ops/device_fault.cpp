#include "xtuner/device_fault.h"

namespace xt {

std::string describe_fault(uint64_t word) {
  const std::string index = std::to_string(word & ((uint64_t{1} << 56) - 1));
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
    case Fault::gemm_src: return "grouped product: src[" + index + "] must be -1 or a choice of one of the tokens";
    default: return "not a fault: " + std::to_string(word);
  }
}

}  // namespace xt
