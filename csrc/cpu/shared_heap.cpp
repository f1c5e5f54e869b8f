#include "cpu/shared_heap.h"

#include <algorithm>

namespace xt::cpu {

int64_t SharedHeap::take(int64_t bytes, uint32_t exchange) {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!resting_.empty() && (alone_ || static_cast<int32_t>(exchange - resting_.front().exchange) >= 2)) {
    release(resting_.front().begin);
    resting_.pop_front();
  }
  bytes = std::max<int64_t>(1, (bytes + align - 1) / align) * align;
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
  }
  if (best == free_.end()) return -1;
  const auto [begin, size] = *best;
  free_.erase(best);
  if (size > bytes) free_[begin + bytes] = size - bytes;
  taken_[begin] = bytes;
  reached_ = std::max(reached_, begin + bytes);
  return begin;
}

void SharedHeap::give_back(int64_t begin, uint32_t exchange) {
  const std::lock_guard<std::mutex> lock(mutex_);
  resting_.push_back({begin, exchange});
}

int64_t SharedHeap::in_use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const auto& piece : taken_) bytes += piece.second;
  return bytes;
}

int64_t SharedHeap::reached() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return reached_;
}

// Back to the free ones, joined with its free neighbours.
void SharedHeap::release(int64_t begin) {
  const auto piece = taken_.find(begin);
  int64_t end = begin + piece->second;
  taken_.erase(piece);
  auto after = free_.lower_bound(begin);
  if (after != free_.end() && after->first == end) {
    end += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) begin = before->first;
  }
  free_[begin] = end - begin;
}

}  // namespace xt::cpu
