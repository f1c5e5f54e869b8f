#include <algorithm>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/rows.h"

namespace xt::cpu {
namespace {

// Choices (flat t*K + k) per block of the counting sort. Every block counts its experts, a scan over (expert, block)
// gives each block its first row, and every block then writes its rows in order: stable whatever the thread count.
constexpr int64_t min_block = 4096;
constexpr int64_t max_blocks = 64;

template <class Index>
void count_block(const Tensor& topk_idx, int64_t begin, int64_t end, int64_t num_experts, int32_t* counts,
                 FirstBad& bad) {
  const Index* idx = topk_idx.ptr<Index>();
  for (int64_t i = begin; i < end; ++i) {
    if (idx[i] < -1 || idx[i] >= num_experts) return bad.report(i);
    if (idx[i] >= 0) ++counts[idx[i]];
  }
}

template <class Index>
void write_block(const Tensor& topk_idx, int64_t begin, int64_t end, int64_t* next_row, int32_t* row_of, int32_t* src) {
  const Index* idx = topk_idx.ptr<Index>();
  for (int64_t i = begin; i < end; ++i) {
    if (idx[i] < 0) {
      row_of[i] = -1;
      continue;
    }
    const int64_t row = next_row[idx[i]]++;
    row_of[i] = static_cast<int32_t>(row);
    src[row] = static_cast<int32_t>(i);
  }
}

template <class Index>
void run(const Tensor& topk_idx, int64_t align, const Tensor& counts_t, const Tensor& offsets_t, const Tensor& row_of,
         const Tensor& src_t, int num_threads) {
  const int64_t total = topk_idx.numel(), k_count = topk_idx.shape[1];
  const int64_t num_experts = counts_t.shape[0], capacity = src_t.shape[0];
  const int64_t block = std::max(min_block, (total + max_blocks - 1) / max_blocks);
  const int64_t num_blocks = (total + block - 1) / block;

  FirstBad bad;
  std::vector<int32_t> block_counts(static_cast<size_t>(num_blocks * num_experts));
  parallel_for(num_threads, num_blocks, [&](int64_t b) {
    count_block<Index>(topk_idx, b * block, std::min(total, (b + 1) * block), num_experts,
                       block_counts.data() + b * num_experts, bad);
  });
  if (bad.any()) {
    fail("route_map: topk_idx[", bad.at() / k_count, ", ", bad.at() % k_count, "] (token ", bad.at() / k_count,
         ") must be in [-1, E=", num_experts, "), got ", topk_idx.ptr<Index>()[bad.at()]);
  }

  int32_t* counts = counts_t.ptr<int32_t>();
  int64_t* offsets = offsets_t.ptr<int64_t>();
  std::vector<int64_t> next_row(block_counts.size());
  offsets[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    int64_t row = offsets[e];
    for (int64_t b = 0; b < num_blocks; ++b) {
      next_row[b * num_experts + e] = row;
      row += block_counts[b * num_experts + e];
    }
    counts[e] = static_cast<int32_t>(row - offsets[e]);
    offsets[e + 1] = (row + align - 1) / align * align;
  }
  if (offsets[num_experts] > capacity) {
    fail("route_map: src has R=", capacity, " rows, but the routing of ", topk_idx.shape[0], " tokens needs ",
         offsets[num_experts], " (with align=", align, ")");
  }

  int32_t* src = src_t.ptr<int32_t>();
  for (int64_t e = 0; e < num_experts; ++e) std::fill(src + offsets[e] + counts[e], src + offsets[e + 1], -1);
  std::fill(src + offsets[num_experts], src + capacity, -1);
  parallel_for(num_threads, num_blocks, [&](int64_t b) {
    write_block<Index>(topk_idx, b * block, std::min(total, (b + 1) * block), next_row.data() + b * num_experts,
                       row_of.ptr<int32_t>(), src);
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
