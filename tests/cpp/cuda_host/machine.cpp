#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "async.h"
#include "memory.h"

// The linker's names for the program's zero-initialised data, where shared variables lie.
extern "C" char __bss_start[], _end[];

namespace cuda_host {
namespace {

constexpr size_t stack_bytes = 64 << 10;
constexpr unsigned lanes = 32;
constexpr size_t shared_element = 4;

enum class Wait { nothing, block, warp, barrier, named, exited };
enum class Collective { sync, exchange, ballot, match, operation };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  Wait wait = Wait::nothing;
  std::string site;  // where it waits
  Collective collective = Collective::sync;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int from = 0;
  void* argument = nullptr;  // of an operation
  void (*perform)(void* const*) = nullptr;
  uint32_t barrier = 0, parity = 0;
  int named = 0, named_threads = 0;
  uint32_t clocks[lanes] = {};

  bool owns(const void* p) const { return p >= stack.get() && p < stack.get() + stack_bytes; }
};

struct Machine {
  std::vector<Fibre> fibres;  // kept between launches for their stacks
  std::vector<Element> shared;
  std::vector<unsigned> order;
  ucontext_t scheduler;
  unsigned threads = 0, blocks = 0, block = 0, current = 0;
  bool in_kernel = false;
  uint64_t launch = 0, epoch = 0, first_epoch = 0;
  void* call = nullptr;
  size_t call_bytes = 0, dynamic_shared_bytes = 0;
  void (*run)(void*) = nullptr;
  std::string violation;
  int device = 0;

  Fibre& fibre() { return fibres[current]; }
  Accessor accessor() { return {launch, epoch, block, current, fibre().clocks}; }

  // Ends the launch: control never comes back to this fibre.
  void fail(const std::string& what) {
    violation = "block " + std::to_string(block) + ", thread " + std::to_string(current) + ": " + what;
    in_kernel = false;
    swapcontext(&fibre().context, &scheduler);
  }

  void pause(Wait wait) {
    fibre().wait = wait;
    in_kernel = false;
    swapcontext(&fibre().context, &scheduler);
    in_kernel = true;
  }

  void run_block();
  bool release_block();
  bool release_warp(unsigned first);
  bool release_barriers();
  bool release_named();
  void finish(unsigned first, unsigned mask);
};

thread_local Machine machine;

// Of all devices; whoever holds the lock uses them.
std::recursive_mutex lock;
uint64_t launches = 0, epochs = 0;
unsigned seed = 0;
std::string skipped;
std::set<std::string> seen;

void enter() {
  machine.in_kernel = true;
  machine.run(machine.call);
  machine.pause(Wait::exited);
}

// Lets the block go on if all its threads wait at one barrier.
bool Machine::release_block() {
  for (unsigned t = 0; t < threads; ++t) {
    if (fibres[t].wait != Wait::block || fibres[t].site != fibres[0].site) return false;
  }
  epoch = ++epochs;
  for (unsigned t = 0; t < threads; ++t) {
    fibres[t].wait = Wait::nothing;
    ++fibres[t].clocks[t % lanes];
  }
  return true;
}

// Lets those lanes of the warp go on whose whole mask waits for the same thing.
bool Machine::release_warp(unsigned first) {
  for (unsigned t = first; t < std::min(first + lanes, threads); ++t) {
    const Fibre& f = fibres[t];
    if (f.wait != Wait::warp) continue;
    bool complete = true;
    for (unsigned l = 0; l < lanes; ++l) {
      if (!(f.mask >> l & 1)) continue;
      const Fibre* o = first + l < threads ? &fibres[first + l] : nullptr;
      complete = complete && o && o->wait == Wait::warp && o->mask == f.mask && o->collective == f.collective &&
                 o->site == f.site;
    }
    if (complete) {
      finish(first, f.mask);
      return true;
    }
  }
  return false;
}

bool Machine::release_barriers() {
  bool released = false;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibres[t].wait != Wait::barrier || !barrier_over(fibres[t].barrier, fibres[t].parity)) continue;
    fibres[t].wait = Wait::nothing;
    released = true;
  }
  return released;
}

bool Machine::release_named() {
  std::map<int, std::vector<unsigned>> waiting;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibres[t].wait == Wait::named) waiting[fibres[t].named].push_back(t);
  }
  bool released = false;
  for (const auto& [id, who] : waiting) {
    if (static_cast<int>(who.size()) < fibres[who[0]].named_threads) continue;
    for (unsigned t : who) fibres[t].wait = Wait::nothing;
    released = true;
  }
  return released;
}

void Machine::finish(unsigned first, unsigned mask) {
  if (fibres[first].collective == Collective::operation && mask == ~0u) {
    void* arguments[lanes];
    for (unsigned l = 0; l < lanes; ++l) {
      arguments[l] = fibres[first + l].argument;
      fibres[first + l].wait = Wait::nothing;
    }
    return fibres[first].perform(arguments);
  }
  uint32_t joined[lanes] = {};
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Fibre& f = fibres[first + l];
    f.wait = Wait::nothing;
    f.result = 0;
    for (unsigned o = 0; o < lanes; ++o) {
      if (!(mask >> o & 1)) continue;
      const uint64_t bit = uint64_t{1} << o;
      if (f.collective == Collective::ballot && fibres[first + o].value) f.result |= bit;
      if (f.collective == Collective::match && fibres[first + o].value == f.value) f.result |= bit;
      joined[o] = std::max(joined[o], fibres[first + l].clocks[o]);
    }
    if (f.collective == Collective::exchange) f.result = fibres[first + f.from].value;
  }
  // Shuffles and votes exchange registers only; __syncwarp alone orders memory.
  if (fibres[first + static_cast<unsigned>(__builtin_ctz(mask))].collective != Collective::sync) return;
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    uint32_t* clocks = fibres[first + l].clocks;
    for (unsigned o = 0; o < lanes; ++o) clocks[o] = std::max(clocks[o], joined[o]);
    ++clocks[l];
  }
}

void Machine::run_block() {
  first_epoch = epoch = ++epochs;
  start_async_block(dynamic_shared_bytes);
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& f = fibres[t];
    f.wait = Wait::nothing;
    std::fill(f.clocks, f.clocks + lanes, 0);
    f.clocks[t % lanes] = 1;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    bool ran = false;
    for (unsigned t : order) {
      if (fibres[t].wait != Wait::nothing) continue;
      current = t;
      ran = true;
      swapcontext(&scheduler, &fibres[t].context);
      if (!violation.empty()) return;
    }
    bool released = release_block();
    for (unsigned first = 0; first < threads; first += lanes) {
      while (release_warp(first)) released = true;
    }
    if (release_barriers() || release_named()) released = true;
    if (ran || released || finish_one_copy()) continue;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibres[t].wait == Wait::exited) continue;
      violation = "block " + std::to_string(block) + ", thread " + std::to_string(t) + ": waits for ever at " +
                  fibres[t].site + ", which not every thread it waits for has reached";
      return;
    }
    if (unfinished()) violation = "block " + std::to_string(block) + " ends with " + unfinished();
    return;  // all have exited
  }
}

void rendezvous(Wait wait, const std::string& site) {
  machine.fibre().site = site;
  machine.pause(wait);
}

uint64_t collect(Collective collective, unsigned mask, uint64_t value, int from, const std::string& site) {
  Fibre& f = machine.fibre();
  if (!(mask >> machine.current % lanes & 1)) machine.fail("lane outside the mask of its own " + site);
  if (collective == Collective::exchange && !(mask >> from & 1)) machine.fail("shuffle from a lane outside the mask");
  f.collective = collective;
  f.mask = mask;
  f.value = value;
  f.from = from;
  f.site = site;
  machine.pause(Wait::warp);
  return f.result;
}

std::string site_of(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

void access(const void* p, size_t bytes, Kind kind) {
  const char* what = kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
  const std::string size = std::to_string(bytes) + "-byte " + what;
  if (reinterpret_cast<uintptr_t>(p) % bytes) machine.fail(size + " at a misaligned address");
  const char* c = static_cast<const char*>(p);
  if (c >= __bss_start && c < _end) {
    const size_t offset = static_cast<size_t>(c - __bss_start);
    Accessor by = machine.accessor();
    by.launch = machine.first_epoch;  // each block has its own: to another block's accesses there is no relation
    if (bytes % shared_element) machine.fail(size + " of shared memory: less than 4 bytes are not modelled");
    for (size_t i = offset / shared_element; i < (offset + bytes) / shared_element; ++i) {
      Element& e = machine.shared[i];
      const bool written = e.writes.in(by.launch) || e.atomics.in(by.launch);
      std::string wrong = kind != Kind::write && !written ? "uninitialised" : e.access(kind, by);
      if (!wrong.empty()) machine.fail(size + " of shared memory, offset " + std::to_string(offset) + ": " + wrong);
    }
    return;
  }
  Buffer* b = Buffer::find(p);
  if (!b) machine.fail(size + " outside all buffers");
  const size_t offset = b->offset_of(p);
  const std::string wrong = b->access(offset, bytes, kind, machine.accessor());
  if (!wrong.empty()) machine.fail(size + " of " + b->name() + ", offset " + std::to_string(offset) + ": " + wrong);
}

}  // namespace

void launch(unsigned blocks, unsigned threads, size_t dynamic_shared_bytes, void* call, size_t call_bytes,
            void (*run)(void*)) {
  const std::lock_guard<std::recursive_mutex> running(lock);
  Machine& m = machine;
  m.blocks = blocks;
  m.threads = threads;
  m.dynamic_shared_bytes = dynamic_shared_bytes;
  m.call = call;
  m.call_bytes = call_bytes;
  m.run = run;
  m.violation.clear();
  m.launch = ++launches;
  if (m.fibres.size() < threads) m.fibres.resize(threads);
  m.shared.resize(static_cast<size_t>(_end - __bss_start) / shared_element + 1);
  m.order.resize(threads);
  std::iota(m.order.begin(), m.order.end(), 0u);
  if (seed == 1) std::reverse(m.order.begin(), m.order.end());
  if (seed > 1) std::shuffle(m.order.begin(), m.order.end(), std::mt19937(seed));
  for (m.block = 0; m.block < blocks && m.violation.empty(); ++m.block) m.run_block();
  if (!m.violation.empty()) throw Violation(m.violation);
}

void set_schedule(unsigned s) { seed = s; }
std::set<std::string>& barriers_seen() { return seen; }
void skip_barrier(const std::string& site) { skipped = site; }
int& current_device() { return machine.device; }
std::recursive_mutex& machine_lock() { return lock; }
Gpu& gpu() {
  static Gpu gpu;
  return gpu;
}
int& shared_limit(void* kernel) {
  static std::map<void*, int> limits;
  return limits.try_emplace(kernel, 48 << 10).first->second;
}

unsigned thread_index() { return machine.current; }
unsigned block_index() { return machine.block; }
unsigned block_size() { return machine.threads; }
unsigned grid_size() { return machine.blocks; }
int lane_index() { return static_cast<int>(machine.current % lanes); }

void sync_block(const char* file, int line) {
  const std::string site = site_of(file, line);
  seen.insert(site);
  if (site == skipped) return;
  machine.fibre().site = site;
  machine.pause(Wait::block);
}

void sync_warp(const char* file, int line) {
  const std::string site = site_of(file, line);
  seen.insert(site);
  if (site != skipped) collect(Collective::sync, ~0u, 0, 0, site);
}

// Lets the other threads of the block run, and other devices.
void nap() {
  machine.pause(Wait::nothing);
  lock.unlock();
  std::this_thread::yield();
  lock.lock();
}

uint64_t exchange(unsigned mask, uint64_t value, int from_lane) {
  return collect(Collective::exchange, mask, value, from_lane, "shuffle");
}
unsigned ballot(unsigned mask, bool value) {
  return static_cast<unsigned>(collect(Collective::ballot, mask, value, 0, "ballot"));
}
unsigned match_any(unsigned mask, uint64_t value) {
  return static_cast<unsigned>(collect(Collective::match, mask, value, 0, "match"));
}

int32_t atomic_add(int32_t* p, int32_t v) {
  access(p, sizeof *p, Kind::atomic);
  const int32_t old = *p;
  *p = old + v;
  return old;
}

unsigned long long atomic_min(unsigned long long* p, unsigned long long v) {
  access(p, sizeof *p, Kind::atomic);
  const unsigned long long old = *p;
  *p = std::min(old, v);
  return old;
}

void atomic_access(const void* p, size_t bytes) {
  if (machine.in_kernel) access(p, bytes, Kind::atomic);
}

unsigned schedule() { return seed; }
const uint32_t* warp_clocks() { return machine.fibre().clocks; }
void fail(const std::string& what) { machine.fail(what); }
void checked_access(const void* p, size_t bytes, bool write) { access(p, bytes, write ? Kind::write : Kind::read); }

void wait_for_barrier(uint32_t barrier, uint32_t parity) {
  machine.fibre().barrier = barrier;
  machine.fibre().parity = parity;
  rendezvous(Wait::barrier, "barrier " + std::to_string(barrier) + ", parity " + std::to_string(parity));
}

void wait_for_named(int id, int threads) {
  machine.fibre().named = id;
  machine.fibre().named_threads = threads;
  rendezvous(Wait::named, "named barrier " + std::to_string(id));
}

void warp_operation(const char* name, void* mine, void (*perform)(void* const*)) {
  machine.fibre().argument = mine;
  machine.fibre().perform = perform;
  collect(Collective::operation, ~0u, 0, 0, name);
}

void plain_access(const void* p, size_t bytes, bool write, bool unaligned) {
  if (!machine.in_kernel || bytes == 0) return;
  if (machine.fibre().owns(p)) return;
  const char* c = static_cast<const char*>(p), *call = static_cast<const char*>(machine.call);
  if (!write && c >= call && c < call + machine.call_bytes) return;
  if (unaligned) machine.fail(std::to_string(bytes) + "-byte access whose alignment the compiler does not know");
  access(p, bytes, write ? Kind::write : Kind::read);
}

void undefined_behaviour(const std::string& what) {
  if (machine.in_kernel) machine.fail(what);
}

}  // namespace cuda_host
