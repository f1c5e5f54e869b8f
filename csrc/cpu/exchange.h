// How ranks wait for each other: one exchange is "everybody writes, tells everybody, waits for those it reads from".
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
    std::atomic<uint32_t> epoch;     // the last exchange that this source has published to the page's owner
    std::atomic<uint32_t> sleeping;  // whether the owner sleeps on `epoch`
    std::atomic<EpOp> op[2];         // what the source did in its last odd and its last even exchange
  };
  Flag from[max_peers];
  alignas(64) std::atomic<uint32_t> failed;  // the exchange in which the owner gave up; 0: none
  std::atomic<int32_t> awaited;              // the rank + 1 the owner waits for, or waited for when it gave up; or 0
  uint32_t epoch;                            // the owner's current exchange; nobody else reads it
};
static_assert(sizeof(Signals) <= signal_bytes);
static_assert(std::atomic<uint32_t>::is_always_lock_free, "the flags are shared between processes");

// What the error of a wait that took too long can say about the rank waited for: the routing of all ranks.
struct Loads {
  const Tensor* counts = nullptr;  // i32 [W, E]
  const Tensor* tokens = nullptr;  // i32 [W, W]
};

// One exchange, from its begin to its end on this rank. Exchanges are numbered; all ranks make the same ones in the same
// order, and in each of them every rank publishes to every other. That is why two areas in turn are enough: a rank that
// writes for exchange n + 2 has seen everybody publish n + 1, so everybody has finished reading what n left.
//
// A rank that leaves an exchange by an exception has broken the group: the others, and its own later exchanges, fail.
class Exchange {
 public:
  Exchange(EpOp op, const Peers& peers, Loads loads = {});
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  char* index(int rank) const { return index_area(peers_, rank, epoch_); }
  char* data(int rank) const { return data_area(peers_, rank, epoch_); }

  void publish() const;  // everything written so far may be read by the others
  // Whether `rank` has published; Error when it has published another op.
  bool arrived(int rank) const;
  void wait(int rank) const;  // until `rank` arrives; Error after timeout_s, or when `rank` has failed
  void wait_all() const;

  // Calls body(rank) once for every other rank, those that have already published first.
  template <class Body>
  void in_order_of_arrival(const Body& body) const {
    bool done[max_peers] = {};
    for (int left = peers_.world - 1; left > 0;) {
      int waiting_for = -1;
      bool progress = false;
      for (int i = 1; i < peers_.world; ++i) {
        const int r = (peers_.rank + i) % peers_.world;
        if (done[r]) continue;
        if (!arrived(r)) {
          if (waiting_for < 0) waiting_for = r;
          continue;
        }
        body(r);
        done[r] = progress = true;
        --left;
      }
      if (!progress && waiting_for >= 0) wait(waiting_for);
    }
  }

  static Signals& signals(const Peers& peers, int rank) { return *static_cast<Signals*>(peers.signal[rank]); }
  static char* index_area(const Peers& peers, int rank, uint32_t epoch) {
    return static_cast<char*>(peers.block[rank]) + (epoch & 1) * peers.index_bytes;
  }
  static char* data_area(const Peers& peers, int rank, uint32_t epoch) {
    return static_cast<char*>(peers.block[rank]) + 2 * peers.index_bytes + (epoch & 1) * peers.data_bytes;
  }

 private:
  std::string name(int rank) const;
  std::string load_of(int rank) const;

  EpOp op_;
  const Peers& peers_;
  Loads loads_;
  uint32_t epoch_;
  int exceptions_;
};

}  // namespace xt::cpu
