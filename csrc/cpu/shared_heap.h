// Which parts of a rank's data area are in use.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>

namespace xt::cpu {

// Hands out pieces of [0, size). Other ranks may still be in the exchange in which this one gave a piece up, so a piece
// rests until this rank has begun two more exchanges: then everybody has published the one between, and none of them reads
// it any more. Any thread may give up pieces.
class SharedHeap {
 public:
  SharedHeap(int64_t size, bool alone) : alone_(alone) { free_[0] = size; }

  static constexpr int64_t align = 4096;

  // The smallest free piece that fits, or -1. `exchange`: number of the last exchange that this rank has begun.
  int64_t take(int64_t bytes, uint32_t exchange);
  void give_back(int64_t begin, uint32_t exchange);
  int64_t in_use() const;
  int64_t reached() const;  // the highest end of any piece so far: what may have been taken from the machine

 private:
  struct Resting {
    int64_t begin;
    uint32_t exchange;
  };
  void release(int64_t begin);

  mutable std::mutex mutex_;
  std::map<int64_t, int64_t> free_, taken_;  // begin -> bytes; taken ones include those that rest
  std::deque<Resting> resting_;
  int64_t reached_ = 0;
  bool alone_;  // there is nobody to wait for
};

}  // namespace xt::cpu
