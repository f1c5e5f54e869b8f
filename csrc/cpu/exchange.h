// How ranks wait for each other: one exchange is "everybody writes, tells everybody, waits for everybody".
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "xtuner/peers.h"
#include "xtuner/tensor.h"

namespace xt::cpu {

enum class EpOp : uint32_t { prepare, dispatch, combine, combine_bwd };
const char* name_of(EpOp op);

// The signal page of a rank.
struct Signals {
  struct alignas(64) Flag {
    std::atomic<uint32_t> epoch;  // the last exchange that this source has published to the page's owner
    std::atomic<EpOp> op[2];      // what the source did in its last odd and its last even exchange
  };
  Flag from[max_peers];
  // The owner sleeps on `arrivals`, which every publication to it raises, and is woken by the one that reaches `wake_at`:
  // once, however many ranks it waits for.
  alignas(64) std::atomic<uint32_t> arrivals;
  std::atomic<uint32_t> wake_at;
  std::atomic<uint32_t> sleeping;
  alignas(64) std::atomic<uint32_t> failed;  // the exchange in which the owner gave up; 0: none
  std::atomic<int32_t> awaited;              // the rank + 1 the owner waits for, or waited for when it gave up; or 0
  std::atomic<uint32_t> epoch;               // the owner's current exchange; of no interest to other ranks
};
static_assert(sizeof(Signals) <= signal_bytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free, "the flags are shared between processes");

// One exchange, from its begin to its end on this rank. Exchanges are numbered; all ranks make the same ones in the same
// order, and in each of them every rank publishes to every other. That is why two index areas in turn are enough: a rank
// that writes for exchange n + 2 has seen everybody publish n + 1, so everybody has finished reading what n left.
//
// A rank that leaves an exchange by an exception has broken the group: the others, and its own later exchanges, fail.
class Exchange {
 public:
  // `counts` (i32 [W, E], or null) is what the error of a wait that took too long tells of the routing.
  Exchange(EpOp op, const Peers& peers, const Tensor* counts = nullptr);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  char* index(int rank) const {
    return static_cast<char*>(peers_.block[rank]) + (epoch_ & 1) * peers_.index_bytes;
  }

  // What was written until now may be read by the others; then waits until all of them have come as far. Error after
  // timeout_s, when a rank has failed, and when a rank is in another op.
  void meet() const;

  static Signals& signals(const Peers& peers, int rank) { return *static_cast<Signals*>(peers.signal[rank]); }

 private:
  void publish() const;
  bool arrived(int rank) const;
  int missing(int* first) const;
  bool spin() const;
  void sleep() const;
  std::string name(int rank) const;
  std::string load_of(int rank) const;

  EpOp op_;
  const Peers& peers_;
  const Tensor* counts_;
  uint32_t epoch_;
  int exceptions_;
};

}  // namespace xt::cpu
