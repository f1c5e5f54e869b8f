#include "cpu/ep.h"

#include <numeric>

#include "cpu/cpu.h"

namespace xt::cpu {

std::vector<int64_t> slot_bases(const int32_t* tokens, int rank, int world) {
  std::vector<int64_t> base(static_cast<size_t>(world));
  for (int p = 0; p < world; ++p) {
    for (int s = 0; s < rank; ++s) base[p] += tokens[s * world + p];
  }
  return base;
}

int64_t ep_room(const Tensor& counts, const Tensor& tokens, int64_t row_bytes) {
  const int64_t world = counts.shape[0], experts = counts.shape[1], here = experts / world;
  int64_t most = 0;
  for (int64_t p = 0; p < world; ++p) {
    int64_t rows = 0, received = 0;
    for (int64_t s = 0; s < world; ++s) {
      const int32_t* of_source = counts.ptr<int32_t>() + s * experts + p * here;
      rows = std::accumulate(of_source, of_source + here, rows);
      received += tokens.ptr<int32_t>()[s * world + p];
    }
    most = std::max({most, rows, received});
  }
  return most * row_bytes;
}

RouteView::RouteView(const char* op, const EpRoute& route, const Peers& peers, int num_threads)
    : op(op),
      rank(peers.rank),
      world(peers.world),
      experts(route.counts.shape[1]),
      experts_here(experts / world),
      num_tokens(route.dest.shape[0]),
      num_choices(route.dest.shape[1]),
      capacity(route.origin.shape[0]),
      counts(route.counts.ptr<int32_t>()),
      tokens(route.tokens.ptr<int32_t>()),
      dest(route.dest.ptr<int32_t>()),
      slot(route.slot.ptr<int32_t>()),
      origin(route.origin.ptr<int32_t>()),
      received(static_cast<size_t>(world)),
      rows(static_cast<size_t>(world)) {
  for (int64_t i = 0; i < world * experts; ++i) {
    if (counts[i] < 0) fail(op, ": counts[", i / experts, ", ", i % experts, "] must not be negative, got ", counts[i]);
    rows[i % experts / experts_here] += counts[i];
  }
  for (int i = 0; i < world * world; ++i) {
    if (tokens[i] < 0) fail(op, ": tokens[", i / world, ", ", i % world, "] must not be negative, got ", tokens[i]);
    received[i % world] += tokens[i];
  }
  if (rows_used() > capacity) fail(op, ": origin has R=", capacity, " rows, but rank ", rank, " gets ", rows_used());
  int64_t next = 0;
  for (int64_t e = 0; e < experts_here; ++e) {
    for (int s = 0; s < world; ++s) {
      first_row.push_back(next);
      next += counts[s * experts + rank * experts_here + e];
    }
    first_row.push_back(next);
  }
  check_indices(num_threads);
}

void RouteView::check_indices(int num_threads) const {
  FirstBad bad_slot, bad_dest, bad_origin;
  parallel_ranges(num_threads, num_tokens, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * world; i < end * world; ++i) {
      if (slot[i] < -1 || slot[i] >= received[i % world]) return bad_slot.report(i);
    }
    for (int64_t i = begin * num_choices; i < end * num_choices; ++i) {
      const int32_t p = dest[2 * i], row = dest[2 * i + 1];
      if (p == -1) continue;
      if (p < -1 || p >= world || row < 0 || row >= rows[p]) return bad_dest.report(i);
    }
  });
  parallel_ranges(num_threads, capacity, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const bool good = r >= rows_used() ? origin[r] == no_origin : origin[r] >= 0 ? origin[r] < received[rank] : -1 - origin[r] < num_tokens;
      if (!good) return bad_origin.report(r);
    }
  });
  if (bad_slot.any()) {
    fail(op, ": slot[", bad_slot.at() / world, ", ", bad_slot.at() % world, "] must be in [-1, ",
         received[bad_slot.at() % world], "), got ", slot[bad_slot.at()]);
  }
  if (bad_dest.any()) {
    fail(op, ": dest[", bad_dest.at() / num_choices, ", ", bad_dest.at() % num_choices,
         "] must be a rank and a row of it, or (-1, -1), got (", dest[2 * bad_dest.at()], ", ",
         dest[2 * bad_dest.at() + 1], ")");
  }
  if (bad_origin.any()) {
    fail(op, ": origin[", bad_origin.at(), "] must be one of ", received[rank], " places or ", num_tokens,
         " tokens, and none from row ", rows_used(), " on, got ", origin[bad_origin.at()]);
  }
}

void RouteView::check_fits(const std::vector<int64_t>& num_rows, const char* what, int64_t row_bytes,
                           const Peers& peers) const {
  for (int p = 0; p < world; ++p) {
    if (num_rows[p] * row_bytes > peers.data_bytes) {
      fail(op, ": rank ", p, " needs room for ", num_rows[p], " ", what, " of ", row_bytes, " bytes, ",
           num_rows[p] * row_bytes, " in all, but the data areas of this group have ", peers.data_bytes);
    }
  }
}

}  // namespace xt::cpu
