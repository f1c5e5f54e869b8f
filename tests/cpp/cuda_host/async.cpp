#include "async.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "machine.h"

namespace cuda_host {
namespace {

constexpr uint32_t base = 1024;  // address of the first byte
constexpr size_t slack = 1024;   // that launches ask for, to align the first byte
constexpr int max_threads = 1024;

alignas(1024) unsigned char memory[most_shared_bytes + 1];
size_t usable;
// Who wrote a 16-byte unit by an ordinary access that no fence has made known to copies and products; 0: nobody, else
// one more than the thread.
int16_t unfenced[most_shared_bytes / 16 + 1];

using Action = std::function<void()>;

// Actions of one thread in groups, as cp.async and wgmma count them.
struct Groups {
  std::deque<std::vector<Action>> closed;
  std::vector<Action> open;

  void commit() {
    closed.push_back(std::move(open));
    open.clear();
  }
  void finish(int pending) {
    while (closed.size() > static_cast<size_t>(pending)) {
      for (const Action& a : closed.front()) a();
      closed.pop_front();
    }
  }
  bool empty() const { return closed.empty() && open.empty(); }
};

using Clocks = std::array<uint32_t, max_threads>;

struct Barrier {
  int arrivals, pending;
  int64_t bytes = 0;  // still expected in this phase
  uint32_t phase = 0;
  Clocks released = {};  // up to which clock of each thread the arrivals are ordered behind

  void settle() {
    if (pending || bytes) return;
    pending = arrivals;
    phase ^= 1;
  }
};

Groups copies[max_threads], products[max_threads];
std::map<uint32_t, Barrier> barriers;
// Ordinary reads of each 16-byte unit: the thread's clock at its last one. A tile copy may replace what was read only if
// barriers order it behind.
std::map<uint32_t, std::map<unsigned, uint32_t>> reads;
std::vector<Clocks> behind;  // per thread: clocks that its waits have ordered before it
std::deque<Action> tiles;  // copies of tiles that have not arrived yet

bool late_copies() { return schedule() & 1; }
bool late_products() { return schedule() & 2; }

bool inside(uint32_t address, size_t bytes) { return address >= base && address - base + bytes <= usable; }

unsigned char* at(uint32_t address, size_t bytes) {
  if (!inside(address, bytes)) fail("shared memory address " + std::to_string(address) + " is outside of the launch's");
  return memory + (address - base);
}

int16_t& writer(uint32_t address) { return unfenced[(address - base) / 16]; }

uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

Barrier& barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("barrier " + std::to_string(address) + " was not initialised");
  return found->second;
}

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

float float8(Format format, unsigned char code) {
  const bool e4m3 = format == Format::e4m3;
  const int bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15, one = 1 << bits;
  const int exponent = (code & 0x7f) >> bits, mantissa = code & (one - 1);
  if (e4m3 ? (code & 0x7f) == 0x7f : exponent == 31 && mantissa) return NAN;
  const float units = static_cast<float>(exponent ? mantissa + one : mantissa);
  const float size = !e4m3 && exponent == 31 ? INFINITY : std::ldexp(units, (exponent ? exponent : 1) - bias - bits);
  return code & 0x80 ? -size : size;
}

// What a product reads through an operand's descriptor.
class Operand {
 public:
  explicit Operand(const WgmmaOperand& o)
      : start_(static_cast<uint32_t>(o.descriptor & 0x3fff) << 4),
        leading_(static_cast<uint32_t>(o.descriptor >> 16 & 0x3fff) << 4),
        stride_(static_cast<uint32_t>(o.descriptor >> 32 & 0x3fff) << 4),
        along_mn_(o.along_mn),
        format_(o.format) {
    const uint64_t bits = o.descriptor;
    if (bits >> 62 != 1) fail("product: only the 128-byte swizzle is modelled");
    if (bits >> 49 & 7) fail("product: the operand's base offset must be 0");
    if (along_mn_ && (format_ != Format::bf16 || start_ % 1024)) fail("product: operand along m or n is not possible so");
  }

  float get(int mn, int k) const {
    uint32_t address = start_;
    if (along_mn_) {
      address += (mn / 64) * leading_ + (mn % 64) * 2 + (k / 8) * stride_ + (k % 8) * 128;
    } else {
      address += (mn / 8) * stride_ + (mn % 8) * 128 + k * (format_ == Format::bf16 ? 2 : 1);
    }
    address = swizzle_128(address);
    if (!inside(address, 2)) fail("product: operand outside of the shared memory that was asked for");
    if (writer(address)) fail("product: reads what an ordinary access wrote and no fence made known");
    const unsigned char* p = memory + (address - base);
    if (format_ != Format::bf16) return float8(format_, *p);
    return widen(static_cast<uint16_t>(p[0] | p[1] << 8));
  }

 private:
  uint32_t start_, leading_, stride_;
  bool along_mn_;
  Format format_;
};

// This thread's part of a product.
void multiply(float* d, int blocks, const Operand& a, const Operand& b, bool add, int k_count, unsigned thread) {
  const int row = static_cast<int>(thread / 32 % 4 * 16 + thread % 32 / 4), col = static_cast<int>(thread % 4 * 2);
  float rows[2][32];
  for (int k = 0; k < k_count; ++k) rows[0][k] = a.get(row, k), rows[1][k] = a.get(row + 8, k);
  for (int n = 0; n < 2 * blocks; ++n) {
    float sums[2] = {0, 0};
    for (int k = 0; k < k_count; ++k) {
      const float x = b.get(n / 2 * 8 + col + n % 2, k);
      sums[0] += rows[0][k] * x;
      sums[1] += rows[1][k] * x;
    }
    for (int half = 0; half < 2; ++half) {
      float& to = d[n / 2 * 4 + 2 * half + n % 2];
      to = add ? to + sums[half] : sums[half];
    }
  }
}

// The whole box, zeros outside of the tensor.
void copy_box(uint32_t to, const TensorMap& map, const std::vector<int>& first, uint32_t barrier) {
  size_t elements = 1;
  for (int i = 0; i < map.rank; ++i) elements *= map.box[i];
  const auto size = static_cast<size_t>(map.element_bytes);
  for (size_t i = 0; i < elements; ++i) {
    size_t rest = i;
    const char* from = map.data;
    bool real = true;
    for (int dim = 0; dim < map.rank; ++dim) {
      const int64_t place = first[dim] + static_cast<int64_t>(rest % map.box[dim]);
      rest /= map.box[dim];
      real = real && place >= 0 && static_cast<uint64_t>(place) < map.dims[dim];
      from += place * static_cast<int64_t>(map.strides[dim]);
    }
    const uint32_t plain = to + static_cast<uint32_t>(i * size), address = map.swizzled ? swizzle_128(plain) : plain;
    unsigned char* p = memory + (address - base);
    if (real) {
      std::memcpy(p, from, size);
    } else {
      std::memset(p, 0, size);
    }
    writer(address) = 0;
  }
  Barrier& b = barriers.at(barrier);
  b.bytes -= static_cast<int64_t>(elements * size);
  b.settle();
}

struct Matrices {
  uint32_t* to;
  uint32_t row;
  bool transposed;
};

void load_matrices_of_warp(void* const* lanes) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Matrices*>(lanes[lane]);
    for (unsigned m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned pair_at = lane % 4 * 2 + i, line = lane / 4;
        const unsigned row = mine.transposed ? pair_at : line, col = mine.transposed ? line : pair_at;
        std::memcpy(&pair[i], memory + (static_cast<Matrices*>(lanes[8 * m + row])->row - base) + 2 * col, 2);
      }
      mine.to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

struct Fragments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

void mma_of_warp(void* const* lanes) {
  const auto of = [&](int lane) -> const Fragments& { return *static_cast<Fragments*>(lanes[lane]); };
  const auto half = [](uint32_t word, int i) { return widen(static_cast<uint16_t>(word >> (16 * i))); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int w = 0; w < 4; ++w) a[g + w % 2 * 8][2 * q + w / 2 * 8 + i] = half(of(lane).a[w], i);
      for (int w = 0; w < 2; ++w) b[2 * q + w * 8 + i][g] = half(of(lane).b[w], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int w = 0; w < 4; ++w) {
      const int row = lane / 4 + w / 2 * 8, col = lane % 4 * 2 + w % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      of(lane).d[w] += sum;
    }
  }
}

}  // namespace

uint32_t dynamic_shared() { return base; }

void start_async_block(size_t dynamic_shared_bytes) {
  usable = dynamic_shared_bytes > slack ? dynamic_shared_bytes - slack : 0;
  std::memset(memory, 0xff, usable);
  std::memset(unfenced, 0, sizeof unfenced[0] * (usable / 16 + 1));
  for (int t = 0; t < max_threads; ++t) {
    copies[t].closed.clear();
    copies[t].open.clear();
    products[t].closed.clear();
    products[t].open.clear();
  }
  barriers.clear();
  tiles.clear();
  reads.clear();
  behind.assign(max_threads, {});
}

const char* unfinished() {
  for (int t = 0; t < max_threads; ++t) {
    if (!products[t].empty()) return "a product that nobody waited for";
  }
  if (!tiles.empty()) return "a tile copy on its way";
  for (const auto& [address, b] : barriers) {
    if (b.bytes) return "a barrier that waits for bytes";
  }
  return nullptr;
}

void copy_async(uint32_t to, const void* from, bool real) {
  unsigned char* p = at(to, 16);
  if (to % 16) fail("cp.async to a misaligned address");
  const int16_t me = static_cast<int16_t>(thread_index() + 1);
  if (real) checked_access(from, 16, false);
  const Action copy = [=] {
    checked_access(p, 16, true);
    if (real) {
      std::memcpy(p, from, 16);
    } else {
      std::memset(p, 0, 16);
    }
    writer(to) = me;
  };
  if (!late_copies()) copy();
  copies[thread_index()].open.push_back(late_copies() ? copy : Action([] {}));
}
void copy_async_commit() { copies[thread_index()].commit(); }
void copy_async_wait(int pending) { copies[thread_index()].finish(pending); }

void load_matrices(uint32_t* to, uint32_t row, bool transposed) {
  checked_access(at(row, 16), 16, false);
  Matrices mine = {to, row, transposed};
  warp_operation("ldmatrix", &mine, load_matrices_of_warp);
}

void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Fragments mine = {d, a, {b0, b1}};
  warp_operation("mma", &mine, mma_of_warp);
}

void barrier_init(uint32_t barrier, int arrivals) {
  at(barrier, 8);
  if (barrier % 8) fail("barrier at a misaligned address");
  barriers[barrier] = {arrivals, arrivals};
}

void barrier_arrive(uint32_t barrier, int expect_bytes) {
  Barrier& b = barrier_at(barrier);
  const unsigned thread = thread_index(), first = thread / 32 * 32;
  for (unsigned l = 0; l < 32; ++l) b.released[first + l] = std::max(b.released[first + l], warp_clocks()[l]);
  if (--b.pending < 0) fail("barrier " + std::to_string(barrier) + ": more arrivals than it was initialised with");
  b.bytes += expect_bytes;
  b.settle();
}

bool barrier_over(uint32_t barrier, uint32_t parity) { return barriers.at(barrier).phase != parity; }

void barrier_wait(uint32_t barrier, uint32_t parity) {
  barrier_at(barrier);
  if (!barrier_over(barrier, parity)) wait_for_barrier(barrier, parity);
  Clocks& mine = behind[thread_index()];
  const Clocks& released = barrier_at(barrier).released;
  std::transform(mine.begin(), mine.end(), released.begin(), mine.begin(), [](auto a, auto b) { return std::max(a, b); });
}

void sync_named(int id, int threads) {
  if (id < 1 || id > 15) fail("named barriers are 1 to 15");
  wait_for_named(id, threads);
}

void fence_proxy_async() {
  const int16_t me = static_cast<int16_t>(thread_index() + 1);
  for (int16_t& w : unfenced) {
    if (w == me) w = 0;
  }
}

void store_zeros(uint32_t to) {
  std::memset(at(to, 16), 0, 16);
  if (to % 16) fail("store to a misaligned address");
  writer(to) = static_cast<int16_t>(thread_index() + 1);
}

void load_shared(uint32_t from, float* x, int count) {
  const unsigned char* p = at(from, 4 * static_cast<size_t>(count));
  if (from % (4 * static_cast<uint32_t>(count))) fail("load from a misaligned address");
  std::memcpy(x, p, 4 * static_cast<size_t>(count));
  const unsigned thread = thread_index();
  reads[from / 16][thread] = warp_clocks()[thread % 32];
}

void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, const int* coordinates, int rank) {
  if (rank != map.rank) fail("tile copy: the tensor map has another rank");
  if (to % (map.swizzled ? 1024 : 128)) fail("tile copy: to a misaligned address");
  size_t bytes = static_cast<size_t>(map.element_bytes);
  for (int i = 0; i < rank; ++i) bytes *= map.box[i];
  at(to, bytes);
  barrier_at(barrier);
  const auto begin = reads.lower_bound(to / 16), end = reads.lower_bound(static_cast<uint32_t>(to + bytes + 15) / 16);
  for (auto unit = begin; unit != end; ++unit) {
    for (const auto& [reader, clock] : unit->second) {
      if (behind[thread_index()][reader] < clock) {
        fail("tile copy: over what thread " + std::to_string(reader) + " reads, in no order");
      }
    }
  }
  reads.erase(begin, end);
  const std::vector<int> first(coordinates, coordinates + rank);
  const Action copy = [=] { copy_box(to, map, first, barrier); };
  if (late_copies()) {
    tiles.push_back(copy);
  } else {
    copy();
  }
}

bool finish_one_copy() {
  if (tiles.empty()) return false;
  // The newest first: the order in which copies arrive is nobody's promise.
  const Action copy = std::move(tiles.back());
  tiles.pop_back();
  copy();
  return true;
}

void wgmma(float* d, int blocks, WgmmaOperand a, WgmmaOperand b, bool add) {
  const unsigned thread = thread_index();
  const Action product = [=] {
    multiply(d, blocks, Operand(a), Operand(b), add, a.format == Format::bf16 ? 16 : 32, thread);
  };
  if (!late_products()) product();
  products[thread].open.push_back(late_products() ? product : Action([] {}));
}
void wgmma_commit() { products[thread_index()].commit(); }
void wgmma_wait(int pending) { products[thread_index()].finish(pending); }

}  // namespace cuda_host
