// What a device kernel notes when it meets a value that the CPU kernel would throw for: it cannot throw, and nobody
// waits for it. The bad value is skipped (each op's header says how) and a 64-bit word that the caller owns, in the
// device's memory, keeps the smallest fault noted so far: the same one on every run.
#pragma once
#include <cstdint>
#include <string>

namespace xt {

enum class Fault : uint8_t {
  route_map_index = 1,  // index: t*K + k
  route_map_capacity,   // index: rows needed
  permute_maps,         // index: t*K + k or row
  unpermute_row_of,     // index: t*K + k
  unpermute_bwd_maps,   // index: t*K + k or row
  offsets,              // index: offsets[E], cut to 56 bits
  offsets_order,        // index: e
  gemm_src,             // index: row
};

constexpr uint64_t no_fault = ~uint64_t{0};  // what the word must hold at the start

constexpr uint64_t fault_word(Fault fault, int64_t index) {
  return static_cast<uint64_t>(fault) << 56 | (static_cast<uint64_t>(index) & ((uint64_t{1} << 56) - 1));
}

// A sentence about a word other than no_fault.
std::string describe_fault(uint64_t word);

}  // namespace xt
