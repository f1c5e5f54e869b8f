// What the expert-parallel ops share: a route as plain pointers, and where the tensors of other ranks are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/exchange.h"
#include "cpu/rows.h"
#include "xtuner/ops/ep_prepare.h"

namespace xt::cpu {

struct RouteView {
  const char* op;
  int rank, world;
  int64_t num_tokens, num_choices;  // T, K
  const int32_t* dest;
  int64_t rows_here, rows_of_all;  // that come to this rank's experts, and to those of all ranks

  RouteView(const char* op, const EpRoute& route, const Peers& peers);

  int64_t rows_used(const Tensor& rows) const { return std::min(rows_here, rows.shape[0]); }

  // Whether rows [R, H] on each rank are better written past the cache, which all ranks share.
  bool worth_streaming(const Tensor& rows) const;

  // Throws Error for the first bad choice i, whose dest is outside the rows [R_p, H] of its rank.
  [[noreturn]] void fail_at(int64_t i) const;
};

// A tensor of the same op on every rank, each in the data area of its rank, known once the ranks have met: `show` writes
// to this rank's index area before that, the constructor reads those of all after it.
class PeerTensor {
 public:
  static void show(const Exchange& exchange, const Peers& peers, int slot, const Tensor& tensor);
  PeerTensor(const Exchange& exchange, const Peers& peers, int slot);

  char* data(int rank) const { return static_cast<char*>(data_[static_cast<size_t>(rank)]); }
  int64_t size(int rank, int dim) const { return shape_[static_cast<size_t>(2 * rank + dim)]; }
  const void* const* table() const { return data_.data(); }
  bool holds(int rank, int64_t row) const { return rank >= 0 && rank < world() && row >= 0 && row < size(rank, 0); }

 private:
  int world() const { return static_cast<int>(data_.size()); }
  std::vector<void*> data_;
  std::vector<int64_t> shape_;
};

}  // namespace xt::cpu
