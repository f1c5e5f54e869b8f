// Small kernels that are wrong in one way each, or right: what the machine must tell apart.
#pragma once
#include <cstdint>

namespace xt::test {

enum class Faulty {
  nothing,              // right: counts in shared memory, barrier, reads
  past_the_end,         // reads values[n]
  never_written,        // reads an output first
  writes_an_input,
  misaligned,           // a 16-byte read at an odd element
  shared_uninitialised,
  shared_index,         // past the end of a shared array
  no_block_barrier,     // reads what another warp wrote
  no_warp_barrier,      // reads what another lane wrote
  warp_barrier,         // right: the same with __syncwarp
  shuffle_is_no_barrier,
  barrier_in_a_branch,  // that some threads do not take
  two_barriers,         // half the block at one, half at another
  exit_before_barrier,
  shuffle_without_a_lane,
  same_element,         // two threads write it
  same_element_across_blocks,
  atomic_and_plain,
  overflow,             // of int
  host_memory,          // reads what is no device memory
};

// 2 blocks of 64 threads; values[n] is an input, out[n] an output, both with n >= 128.
void run_faulty(Faulty what, const int32_t* values, int32_t* out, int64_t n, const int32_t* host);

}  // namespace xt::test
