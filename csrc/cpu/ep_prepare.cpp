#include "xtuner/ops/ep_prepare.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/exchange.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {
namespace {

// What a rank shows the others in its index area.
struct Shown {
  int64_t& bound;   // rows it has
  int32_t* counts;  // [E]

  explicit Shown(char* area) : bound(*reinterpret_cast<int64_t*>(area)), counts(reinterpret_cast<int32_t*>(area + 8)) {}
};

}  // namespace

void ep_prepare(const Tensor& topk_idx, int64_t capacity, const Peers& peers, const Tensor& counts_t,
                const Tensor& dest_t, const Tensor& offsets_t, int num_threads) {
  const int64_t experts = counts_t.shape[1], here = experts / peers.world, choices = topk_idx.numel();
  const int64_t num_tokens = topk_idx.shape[0], k_count = topk_idx.shape[1];
  const int me = peers.rank, world = peers.world;
  int32_t* counts = counts_t.ptr<int32_t>();
  if (8 + experts * 4 > peers.index_bytes) {
    fail("ep_prepare: the counts of E=", experts, " experts do not fit an index area of ", peers.index_bytes, " bytes");
  }

  Exchange exchange(EpOp::prepare, peers);
  const Shown mine(exchange.index(me));
  mine.bound = capacity < 0 ? INT64_MAX : capacity;
  // row[i] - first_of[e]: earlier choices of the same expert on this rank.
  std::vector<int64_t> first_of(static_cast<size_t>(experts) + 1);
  const std::unique_ptr<int32_t[]> row(new int32_t[static_cast<size_t>(choices)]), src(new int32_t[static_cast<size_t>(choices)]);
  route_map(topk_idx, 1, Tensor(mine.counts, DType::i32, {experts}), Tensor(first_of.data(), DType::i64, {experts + 1}),
            Tensor(row.get(), DType::i32, {num_tokens, k_count}), Tensor(src.get(), DType::i32, {choices}), num_threads);
  exchange.meet();
  for (int s = 0; s < world; ++s) {
    const Shown theirs(exchange.index(s));
    std::copy(theirs.counts, theirs.counts + experts, counts + s * experts);
  }

  // First row, on its owner, of what this rank sends to each expert; and the experts of this rank.
  std::vector<int64_t> first_row(static_cast<size_t>(experts)), bound;
  int64_t* offsets = offsets_t.ptr<int64_t>();
  for (int p = 0; p < world; ++p) {
    bound.push_back(Shown(exchange.index(p)).bound);
    int64_t next = 0;
    for (int64_t e = p * here; e < (p + 1) * here; ++e) {
      if (p == me) offsets[e - p * here] = std::min(next, bound[p]);
      for (int s = 0; s < world; ++s) {
        if (s == me) first_row[e] = next;
        next += counts[s * experts + e];
      }
    }
    if (p == me) offsets[here] = std::min(next, bound[p]);
    if (next > INT32_MAX) fail("ep_prepare: rank ", p, " would get ", next, " rows; at most 2^31 - 1 are possible");
  }
  int32_t* dest = dest_t.ptr<int32_t>();
  parallel_ranges(num_threads, choices, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = topk_idx.dtype == DType::i32 ? topk_idx.ptr<int32_t>()[i] : topk_idx.ptr<int64_t>()[i];
      const int32_t p = e < 0 ? -1 : static_cast<int32_t>(static_cast<uint32_t>(e) / static_cast<uint32_t>(here));
      const int64_t to = e < 0 ? 0 : first_row[e] + row[i] - first_of[e];
      const bool kept = p >= 0 && to < bound[p];
      dest[2 * i] = kept ? p : -1;
      dest[2 * i + 1] = kept ? static_cast<int32_t>(to) : -1;
    }
  });
}

}  // namespace xt::cpu
