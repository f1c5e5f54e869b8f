#include <algorithm>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

// A counting sort over blocks of choices (flat t*K + k). Every block ranks its choices within their experts, a scan
// over (block, expert) gives each block its first row of each expert, and every block then writes its rows: stable
// however many blocks there are, and no pass waits for its own last store to the same counter.
constexpr int64_t min_block = 32768;  // some 50 us of work, several times what waking a thread takes
constexpr int64_t blocks_per_thread = 4;

// rank[i] = earlier choices of the same expert in this block. `counts` has a place for dropped choices before expert 0.
template <class Index>
void rank_block(const Index* idx, int64_t begin, int64_t end, int64_t num_experts, int32_t* counts, int32_t* rank,
                FirstBad& bad) {
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t place = static_cast<uint64_t>(static_cast<int64_t>(idx[i])) + 1;
    if (place > static_cast<uint64_t>(num_experts)) return bad.report(i);
    rank[i] = counts[place]++;
  }
}

template <class Index>
void write_block(const Index* idx, int64_t begin, int64_t end, const int32_t* first_row, int32_t* row_of,
                 int32_t* src) {
  for (int64_t i = begin; i < end; ++i) {
    if (idx[i] < 0) {
      row_of[i] = -1;
      continue;
    }
    const int32_t row = first_row[idx[i] + 1] + row_of[i];
    row_of[i] = row;
    src[row] = static_cast<int32_t>(i);
  }
}

// Turns each block's counts into the number of earlier blocks' choices; counts[e] = all of them.
void scan_blocks(std::vector<int32_t>& block_counts, int64_t num_blocks, int64_t num_experts, int32_t* counts) {
  std::fill(counts, counts + num_experts, 0);
  for (int64_t b = 0; b < num_blocks; ++b) {
    int32_t* block = block_counts.data() + b * (num_experts + 1) + 1;
    for (int64_t e = 0; e < num_experts; ++e) {
      const int32_t n = block[e];
      block[e] = counts[e];
      counts[e] += n;
    }
  }
}

template <class Index>
void run(const Tensor& topk_idx, int64_t align, const Tensor& counts_t, const Tensor& offsets_t, const Tensor& row_of_t,
         const Tensor& src_t, int num_threads) {
  const Index* idx = topk_idx.ptr<Index>();
  const int64_t total = topk_idx.numel(), k_count = topk_idx.shape[1];
  const int64_t num_experts = counts_t.shape[0], capacity = src_t.shape[0];
  int32_t *counts = counts_t.ptr<int32_t>(), *row_of = row_of_t.ptr<int32_t>(), *src = src_t.ptr<int32_t>();
  int64_t* offsets = offsets_t.ptr<int64_t>();
  const int64_t wanted_blocks = num_threads > 1 ? num_threads * blocks_per_thread : 1;
  const int64_t block = std::max(min_block, (total + wanted_blocks - 1) / wanted_blocks);
  const int64_t num_blocks = (total + block - 1) / block;

  FirstBad bad;
  std::vector<int32_t> block_counts(static_cast<size_t>(num_blocks * (num_experts + 1)));
  parallel_ranges(num_threads, total, block, [&](int64_t begin, int64_t end) {
    rank_block(idx, begin, end, num_experts, block_counts.data() + begin / block * (num_experts + 1), row_of, bad);
  });
  if (bad.any()) {
    fail("route_map: topk_idx[", bad.at() / k_count, ", ", bad.at() % k_count, "] (token ", bad.at() / k_count,
         ") must be in [-1, E=", num_experts, "), got ", idx[bad.at()]);
  }

  scan_blocks(block_counts, num_blocks, num_experts, counts);
  offsets[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] = (offsets[e] + counts[e] + align - 1) / align * align;
  if (offsets[num_experts] > capacity) {
    fail("route_map: src has R=", capacity, " rows, but the routing of ", topk_idx.shape[0], " tokens needs ",
         offsets[num_experts], " (with align=", align, ")");
  }

  for (int64_t e = 0; e < num_experts; ++e) std::fill(src + offsets[e] + counts[e], src + offsets[e + 1], -1);
  std::fill(src + offsets[num_experts], src + capacity, -1);
  parallel_ranges(num_threads, total, block, [&](int64_t begin, int64_t end) {
    int32_t* first_row = block_counts.data() + begin / block * (num_experts + 1);
    for (int64_t e = 0; e < num_experts; ++e) first_row[e + 1] += static_cast<int32_t>(offsets[e]);
    write_block(idx, begin, end, first_row, row_of, src);
  });
}

}  // namespace

void route_map(const Tensor& topk_idx, int64_t align, const Tensor& counts, const Tensor& offsets,
               const Tensor& row_of, const Tensor& src, int num_threads) {
  if (topk_idx.dtype == DType::i32) {
    run<int32_t>(topk_idx, align, counts, offsets, row_of, src, num_threads);
  } else {
    run<int64_t>(topk_idx, align, counts, offsets, row_of, src, num_threads);
  }
}

}  // namespace xt::cpu
