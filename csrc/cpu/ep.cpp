#include "cpu/ep.h"

#include <numeric>

#include "cpu/cache.h"

namespace xt::cpu {
namespace {

// How a rank tells the others about a tensor.
struct Shown {
  int64_t begin, shape[2];  // first byte, from the start of the rank's data area
};

Shown& shown(const Exchange& exchange, int rank, int slot) {
  return reinterpret_cast<Shown*>(exchange.index(rank))[slot];
}

}  // namespace

RouteView::RouteView(const char* op, const EpRoute& route, const Peers& peers)
    : op(op),
      rank(peers.rank),
      world(peers.world),
      num_tokens(route.dest.shape[0]),
      num_choices(route.dest.shape[1]),
      dest(route.dest.ptr<int32_t>()),
      rows_here(0),
      rows_of_all(0) {
  const int64_t experts = route.counts.shape[1], here = experts / world;
  for (int s = 0; s < world; ++s) {
    const int32_t* counts = route.counts.ptr<int32_t>() + s * experts;
    rows_of_all = std::accumulate(counts, counts + experts, rows_of_all);
    rows_here = std::accumulate(counts + rank * here, counts + (rank + 1) * here, rows_here);
  }
}

bool RouteView::worth_streaming(const Tensor& rows) const {
  return cpu::worth_streaming(Tensor(rows.data, rows.dtype, {std::max(rows_of_all, rows.shape[0]), rows.shape[1]}));
}

void RouteView::fail_at(int64_t i) const {
  fail(op, ": dest[", i / num_choices, ", ", i % num_choices, "] must be a rank and a row of it, or (-1, -1), got (",
       dest[2 * i], ", ", dest[2 * i + 1], ")");
}

void PeerTensor::show(const Exchange& exchange, const Peers& peers, int slot, const Tensor& tensor) {
  const int64_t begin = tensor.numel() == 0 ? 0 : tensor.ptr<char>() - peers.data(peers.rank);
  shown(exchange, peers.rank, slot) = {begin, {tensor.shape[0], tensor.shape[1]}};
}

PeerTensor::PeerTensor(const Exchange& exchange, const Peers& peers, int slot) {
  for (int r = 0; r < peers.world; ++r) {
    const Shown& theirs = shown(exchange, r, slot);
    data_.push_back(peers.data(r) + theirs.begin);
    shape_.insert(shape_.end(), {theirs.shape[0], theirs.shape[1]});
  }
}

}  // namespace xt::cpu
