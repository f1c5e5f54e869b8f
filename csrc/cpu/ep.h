// What the expert-parallel ops share: the geometry of a route, and the checks that keep a wrong map from reaching into
// another process's memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/exchange.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "xtuner/ops/ep_prepare.h"

namespace xt::cpu {

constexpr int32_t no_origin = INT32_MIN;

// First place of `rank`'s tokens in the receive buffer of each other rank; places are ordered by source.
std::vector<int64_t> slot_bases(const int32_t* tokens, int rank, int world);

// A route as plain pointers, with its sums.
struct RouteView {
  const char* op;
  int rank, world;
  int64_t experts, experts_here, num_tokens, num_choices, capacity;  // E, E/W, T, K, R
  const int32_t *counts, *tokens, *dest, *slot, *origin;
  std::vector<int64_t> received;   // places in use in the receive buffer of each rank
  std::vector<int64_t> rows;       // rows in use at each rank
  std::vector<int64_t> first_row;  // [E/W, W + 1]: first row of a local expert that comes from a rank, and its last + 1

  // Throws Error naming the first index that points outside the memory of its rank.
  RouteView(const char* op, const EpRoute& route, const Peers& peers, int num_threads);

  int64_t rows_used() const { return rows[static_cast<size_t>(rank)]; }
  int64_t first(int64_t expert, int source) const {
    return first_row[static_cast<size_t>(expert * (world + 1) + source)];
  }
  // Throws, on all ranks alike, unless every data area holds num_rows[p] rows.
  void check_fits(const std::vector<int64_t>& num_rows, const char* what, int64_t row_bytes, const Peers& peers) const;

 private:
  void check_indices(int num_threads) const;
};

// Calls body(row, place) for each row that comes from `source`, in blocks of neighbouring places, so that a token whose
// copies go to several experts is read from memory once. Within an expert's rows of one source, places ascend.
template <class Body>
void for_rows_from(const RouteView& route, int source, int64_t row_bytes, int num_threads, const Body& body) {
  int64_t base = 0;
  for (int s = 0; s < source; ++s) base += route.tokens[s * route.world + route.rank];
  const int64_t count = route.tokens[source * route.world + route.rank];
  parallel_ranges(num_threads, count, 4 * rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t e = 0; e < route.experts_here; ++e) {
      const int32_t* last = route.origin + route.first(e, source + 1);
      const int32_t* at = std::lower_bound(route.origin + route.first(e, source), last, base + begin);
      for (; at < last && *at < base + end; ++at) body(at - route.origin, *at);
    }
    kernels().fence();  // rows may have been streamed
  });
}

}  // namespace xt::cpu
