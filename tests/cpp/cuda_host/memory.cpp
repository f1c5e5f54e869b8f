#include "memory.h"

#include <cstring>

#include "machine.h"

namespace cuda_host {

void Accesses::add(const Accessor& a) {
  const int warp = static_cast<int>(a.thread / 32);
  if (launch_ != a.launch || (block_ == a.block && epoch_ != a.epoch && !many_blocks_)) {
    *this = Accesses();
    launch_ = a.launch;
    epoch_ = a.epoch;
    block_ = a.block;
    warp_ = warp;
  } else if (block_ != a.block) {
    many_blocks_ = true;
  }
  if (warp_ != warp) warp_ = many;
  clock_[a.thread % 32] = a.clocks[a.thread % 32];
}

bool Accesses::unordered_with(const Accessor& a) const {
  if (launch_ != a.launch) return false;
  if (many_blocks_ || block_ != a.block) return true;
  if (epoch_ != a.epoch) return false;
  if (warp_ != static_cast<int>(a.thread / 32)) return true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lane != a.thread % 32 && clock_[lane] > a.clocks[lane]) return true;
  }
  return false;
}

std::string Element::access(Kind kind, const Accessor& a) {
  if (writes.unordered_with(a)) return "race with another thread's write";
  if (kind != Kind::atomic && atomics.unordered_with(a)) return "race with another thread's atomic";
  if (kind != Kind::read && reads.unordered_with(a)) return "race with another thread's read";
  (kind == Kind::read ? reads : kind == Kind::write ? writes : atomics).add(a);
  return "";
}

std::map<const char*, Buffer*>& Buffer::all() {
  static std::map<const char*, Buffer*> buffers;
  return buffers;
}

Buffer::Buffer(std::string name, const void* data, size_t bytes, size_t element, Use use)
    : name_(std::move(name)), begin_(static_cast<const char*>(data)), bytes_(bytes), element_(element), use_(use) {
  const std::lock_guard<std::recursive_mutex> alone(machine_lock());
  if (use != Use::input) elements_.resize(bytes / element);
  if (bytes) all()[begin_] = this;
}

Buffer::~Buffer() {
  const std::lock_guard<std::recursive_mutex> alone(machine_lock());
  if (bytes_) all().erase(begin_);
}

Buffer* Buffer::find(const void* p) {
  auto after = all().upper_bound(static_cast<const char*>(p));
  if (after == all().begin()) return nullptr;
  Buffer* b = std::prev(after)->second;
  return b->offset_of(p) < b->bytes_ ? b : nullptr;
}

std::string Buffer::access(size_t offset, size_t bytes, Kind kind, const Accessor& a) {
  if (offset + bytes > bytes_) return "out of bounds";
  if (kind != Kind::write) {
    for (const auto& [begin, end] : forbidden_) {
      if (offset < end && offset + bytes > begin) return "memory that must not be read";
    }
  }
  if (use_ == Use::input) return kind == Kind::read ? "" : "write to an input";
  if (bytes % element_ || offset % element_) return "part of an element";
  for (size_t i = offset / element_; i < (offset + bytes) / element_; ++i) {
    Element& e = elements_[i];
    if (use_ == Use::output && kind != Kind::write && e.writes.none() && e.atomics.none()) return "never written";
    std::string wrong = e.access(kind, a);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace cuda_host
