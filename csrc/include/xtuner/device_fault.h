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
  ep_timeout,           // index: ep_fault_index, as the next two
  ep_gave_up,
  ep_order,
  ep_rows,              // index: rows
  ep_dest,              // index: t*K + k
  gemm_columns,         // index: e
};

// Another rank in an exchange: the op (1 to 4, in the order of describe_fault), the rank and the exchange's number.
constexpr int64_t ep_fault_index(uint32_t op, int rank, uint32_t exchange) {
  return static_cast<int64_t>(op) << 40 | static_cast<int64_t>(rank) << 32 | exchange;
}

constexpr uint64_t no_fault = ~uint64_t{0};  // what the word must hold at the start

constexpr uint64_t fault_word(Fault fault, int64_t index) {
  return static_cast<uint64_t>(fault) << 56 | (static_cast<uint64_t>(index) & ((uint64_t{1} << 56) - 1));
}

// A sentence about a word other than no_fault.
std::string describe_fault(uint64_t word);

}  // namespace xt
