#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/exchange.h"

namespace xt::cpu {
namespace {

// What a rank shows the others in its index area: choices per expert, tokens travelling to each rank, and for each choice,
// grouped by expert, the number of its token among those that travel to the expert's rank (or -1 - t at home).
struct Shown {
  int32_t* counts;  // [E]
  int32_t* tokens;  // [W]
  int32_t* list;    // [choices kept]

  Shown(char* area, int64_t experts, int world)
      : counts(reinterpret_cast<int32_t*>(area)), tokens(counts + experts), list(tokens + world) {}
};

// slot[t, p] = number of token t among those that travel from here to rank p.
template <class Index>
void number_travellers(const Tensor& topk_idx, int rank, int world, int64_t experts_per_rank, int32_t* slot,
                       int32_t* travellers) {
  const int64_t tokens = topk_idx.shape[0], k_count = topk_idx.shape[1];
  const Index* idx = topk_idx.ptr<Index>();
  std::fill(travellers, travellers + world, 0);
  std::fill(slot, slot + tokens * world, -1);
  for (int64_t t = 0; t < tokens; ++t, idx += k_count, slot += world) {
    for (int64_t k = 0; k < k_count; ++k) {
      if (idx[k] < 0) continue;
      const int p = static_cast<int>(static_cast<uint32_t>(idx[k]) / static_cast<uint32_t>(experts_per_rank));
      if (p != rank && slot[p] < 0) slot[p] = travellers[p]++;
    }
  }
}

// Turns list[j] from "flat choice" into what Shown promises.
void show_travellers(const std::vector<int64_t>& first_of, int rank, int world, int64_t experts_per_rank,
                     int64_t k_count, const int32_t* slot, int32_t* list) {
  for (int p = 0; p < world; ++p) {
    const int64_t end = first_of[(p + 1) * experts_per_rank];
    for (int64_t j = first_of[p * experts_per_rank]; j < end; ++j) {
      const int32_t t = list[j] / static_cast<int32_t>(k_count);
      list[j] = p == rank ? -1 - t : slot[t * world + p];
    }
  }
}

}  // namespace

void ep_prepare(const Tensor& topk_idx, const Peers& peers, const Tensor& counts_t, const Tensor& tokens_t,
                const Tensor& dest_t, const Tensor& slot_t, const Tensor& offsets_t, int num_threads) {
  const int64_t experts = counts_t.shape[1], here = experts / peers.world, choices = topk_idx.numel();
  const int64_t num_tokens = topk_idx.shape[0], k_count = topk_idx.shape[1];
  const int me = peers.rank, world = peers.world;
  int32_t *counts = counts_t.ptr<int32_t>(), *tokens = tokens_t.ptr<int32_t>(), *slot = slot_t.ptr<int32_t>();

  Exchange exchange(EpOp::prepare, peers);
  const int64_t needed = (experts + world + choices) * 4;
  if (needed > peers.index_bytes) {
    fail("ep_prepare: the T*K=", choices, " choices of rank ", me, " need ", needed, " bytes of an index area of ",
         peers.index_bytes);
  }
  const Shown mine(exchange.index(me), experts, world);
  std::vector<int64_t> first_of(static_cast<size_t>(experts) + 1);
  const std::unique_ptr<int32_t[]> row(new int32_t[static_cast<size_t>(choices)]);
  route_map(topk_idx, 1, Tensor(mine.counts, DType::i32, {experts}), Tensor(first_of.data(), DType::i64, {experts + 1}),
            Tensor(row.get(), DType::i32, {num_tokens, k_count}), Tensor(mine.list, DType::i32, {choices}), num_threads);
  if (topk_idx.dtype == DType::i32) {
    number_travellers<int32_t>(topk_idx, me, world, here, slot, mine.tokens);
  } else {
    number_travellers<int64_t>(topk_idx, me, world, here, slot, mine.tokens);
  }
  show_travellers(first_of, me, world, here, k_count, slot, mine.list);
  exchange.publish();
  exchange.wait_all();

  for (int s = 0; s < world; ++s) {
    const Shown theirs(exchange.index(s), experts, world);
    std::copy(theirs.counts, theirs.counts + experts, counts + s * experts);
    std::copy(theirs.tokens, theirs.tokens + world, tokens + s * world);
  }
  // First row, on its owner, of what this rank sends to each expert; and the experts of this rank.
  std::vector<int64_t> first_row(static_cast<size_t>(experts));
  int64_t* offsets = offsets_t.ptr<int64_t>();
  for (int p = 0; p < world; ++p) {
    int64_t next = 0;
    for (int64_t e = p * here; e < (p + 1) * here; ++e) {
      if (p == me) offsets[e - p * here] = next;
      for (int s = 0; s < world; ++s) {
        if (s == me) first_row[e] = next;
        next += counts[s * experts + e];
      }
    }
    if (p == me) offsets[here] = next;
    if (next > INT32_MAX) fail("ep_prepare: rank ", p, " would get ", next, " rows; at most 2^31 - 1 are possible");
  }
  int32_t* dest = dest_t.ptr<int32_t>();
  const std::vector<int64_t> base = slot_bases(tokens, me, world);
  parallel_ranges(num_threads, num_tokens, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * k_count; i < end * k_count; ++i) {
      const int64_t e = topk_idx.dtype == DType::i32 ? topk_idx.ptr<int32_t>()[i] : topk_idx.ptr<int64_t>()[i];
      dest[2 * i] = e < 0 ? -1 : static_cast<int32_t>(static_cast<uint32_t>(e) / static_cast<uint32_t>(here));
      dest[2 * i + 1] = e < 0 ? -1 : static_cast<int32_t>(first_row[e] + row[i] - first_of[e]);
    }
    for (int64_t t = begin; t < end; ++t) {
      for (int p = 0; p < world; ++p) {
        if (slot[t * world + p] >= 0) slot[t * world + p] += static_cast<int32_t>(base[p]);
      }
    }
  });
}

void ep_prepare_rows(const Peers& peers, const Tensor& counts_t, const Tensor& tokens_t, const Tensor& offsets_t,
                     const Tensor& origin_t) {
  const int64_t experts = counts_t.shape[1], here = experts / peers.world, capacity = origin_t.shape[0];
  const int me = peers.rank, world = peers.world;
  const int32_t *counts = counts_t.ptr<int32_t>(), *tokens = tokens_t.ptr<int32_t>();
  const int64_t* offsets = offsets_t.ptr<int64_t>();
  int32_t* origin = origin_t.ptr<int32_t>();
  if (offsets[here] > capacity) {
    fail("ep_prepare_rows: origin has R=", capacity, " rows, but rank ", me, " gets ", offsets[here]);
  }
  const uint32_t epoch = Exchange::signals(peers, me).epoch;
  std::vector<int64_t> next_row(offsets, offsets + here);
  int64_t base = 0;  // of the places of source s
  for (int s = 0; s < world; ++s) {
    const Shown theirs(Exchange::index_area(peers, s, epoch), experts, world);
    const int32_t* from = theirs.list;
    for (int64_t e = 0; e < me * here; ++e) from += counts[s * experts + e];
    const int32_t shift = s == me ? 0 : static_cast<int32_t>(base);
    for (int64_t e = 0; e < here; ++e) {
      const int64_t n = counts[s * experts + me * here + e];
      int32_t* to = origin + next_row[e];
      for (int64_t j = 0; j < n; ++j) to[j] = from[j] + shift;
      from += n;
      next_row[e] += n;
    }
    base += tokens[s * world + me];
  }
  std::fill(origin + offsets[here], origin + capacity, no_origin);
}

}  // namespace xt::cpu
