// What is known about every element of device and shared memory, and the rules that accesses must keep.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cuda_host {

// Who accesses. Epochs count __syncthreads over all blocks that ever ran, so a block's accesses before a barrier have a
// smaller epoch than those after it. `clocks` is the thread's vector clock over the lanes of its warp, for __syncwarp.
struct Accessor {
  uint64_t launch, epoch;
  unsigned block, thread;
  const uint32_t* clocks;
};

enum class Kind { read, write, atomic };

// The accesses of one kind to one element that may still be unordered with a later access: those of one epoch of one
// block. One thread, or the lanes of one warp, are kept exactly; more than that is known to be unordered with anybody
// within the epoch.
class Accesses {
 public:
  void add(const Accessor& a);
  // Some access here is by another thread and not ordered before `a`.
  bool unordered_with(const Accessor& a) const;
  bool none() const { return launch_ == 0; }
  bool in(uint64_t launch) const { return launch_ == launch; }

 private:
  static constexpr int many = -1;
  uint64_t launch_ = 0, epoch_ = 0;
  unsigned block_ = 0;
  int warp_ = 0;
  bool many_blocks_ = false;
  uint32_t clock_[32] = {};  // own clock of each lane at its last access, 0: none
};

struct Element {
  Accesses reads, writes, atomics;

  // Empty, or what is wrong with this access.
  std::string access(Kind kind, const Accessor& a);
};

// Memory that the test handed to the device.
class Buffer {
 public:
  enum class Use { input, output, in_out };  // output: nothing may be read that no kernel wrote
  Buffer(std::string name, const void* data, size_t bytes, size_t element, Use use);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void forbid_reading(size_t begin, size_t end) { forbidden_.emplace_back(begin, end); }  // bytes
  static Buffer* find(const void* p);

  // Empty, or what is wrong.
  std::string access(size_t offset, size_t bytes, Kind kind, const Accessor& a);
  const std::string& name() const { return name_; }
  size_t offset_of(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - begin_); }

 private:
  static std::map<const char*, Buffer*>& all();
  std::string name_;
  const char* begin_;
  size_t bytes_, element_;
  Use use_;
  std::vector<std::pair<size_t, size_t>> forbidden_;
  std::vector<Element> elements_;  // of what kernels may write
};

}  // namespace cuda_host
