#include "cpu/exchange.h"

#include <chrono>
#include <exception>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xt::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How long a rank polls before it sleeps, where every rank can have a core of its own.
constexpr std::chrono::microseconds spin_time{20};
// A sleeper looks up this often, to see the time and whether the rank it waits for has failed.
constexpr std::chrono::milliseconds nap{50};

// Sleeps while `word` is `value`, at most for one nap; may also return for no reason.
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
#ifdef __linux__
  const timespec time = {0, std::chrono::nanoseconds(nap).count()};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &time, nullptr, 0);
#else
  (void)word, (void)value;
  std::this_thread::yield();
#endif
}

void wake(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

// Epochs wrap around after 2^32 exchanges.
bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

const char* name_of(EpOp op) {
  switch (op) {
    case EpOp::prepare: return "ep_prepare";
    case EpOp::dispatch: return "ep_dispatch";
    case EpOp::combine: return "ep_combine";
    default: return "ep_combine_bwd";
  }
}

Exchange::Exchange(EpOp op, const Peers& peers, Loads loads)
    : op_(op), peers_(peers), loads_(loads), exceptions_(std::uncaught_exceptions()) {
  Signals& own = signals(peers, peers.rank);
  const uint32_t failed = own.failed.load(std::memory_order_relaxed);
  if (failed) fail(name_of(op), ": rank ", peers.rank, " gave this group up in exchange ", failed, "; make a new group");
  if (++own.epoch == 0) own.epoch = 2;  // 0 means that nothing has been published; the areas still take turns
  epoch_ = own.epoch;
}

Exchange::~Exchange() {
  if (std::uncaught_exceptions() > exceptions_) signals(peers_, peers_.rank).failed.store(epoch_);
}

void Exchange::publish() const {
  for (int i = 1; i < peers_.world; ++i) {
    const int r = (peers_.rank + i) % peers_.world;
    Signals::Flag& flag = signals(peers_, r).from[peers_.rank];
    flag.op[epoch_ & 1].store(op_, std::memory_order_relaxed);
    // Sequentially consistent, like the sleeper's two accesses: either it sees the epoch or we see it sleeping.
    flag.epoch.store(epoch_);
    if (flag.sleeping.load()) wake(flag.epoch);
  }
}

bool Exchange::arrived(int rank) const {
  const Signals::Flag& flag = signals(peers_, peers_.rank).from[rank];
  if (!reached(flag.epoch.load(std::memory_order_acquire), epoch_)) return false;
  const EpOp theirs = flag.op[epoch_ & 1].load(std::memory_order_relaxed);
  if (theirs != op_) {
    fail(name_of(op_), ": all ranks must call the same ops in the same order, but in exchange ", epoch_, " rank ", rank,
         " is in ", name_of(theirs), " and rank ", peers_.rank, " in ", name_of(op_));
  }
  return true;
}

void Exchange::wait(int rank) const {
  if (arrived(rank)) return;
  static const bool crowded = static_cast<int>(std::thread::hardware_concurrency()) < peers_.world;
  const auto start = Clock::now();
  while (!crowded && Clock::now() - start < spin_time) {
    for (int i = 0; i < 16; ++i) {
      if (arrived(rank)) return;
      relax();
    }
  }
  Signals::Flag& flag = signals(peers_, peers_.rank).from[rank];
  const auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(peers_.timeout_s));
  std::atomic<int32_t>& awaited = signals(peers_, peers_.rank).awaited;
  awaited.store(rank + 1, std::memory_order_relaxed);
  flag.sleeping.store(1);
  uint32_t seen = flag.epoch.load();
  while (!reached(seen, epoch_)) {
    const uint32_t failed = signals(peers_, rank).failed.load(std::memory_order_relaxed);
    if (failed && !reached(flag.epoch.load(), epoch_)) {
      flag.sleeping.store(0);
      fail(name_of(op_), ": rank ", peers_.rank, " waits for ", name(rank), ", which gave up in exchange ", failed, load_of(rank));
    }
    if (Clock::now() >= end) {
      flag.sleeping.store(0);
      fail(name_of(op_), ": rank ", peers_.rank, " waited ", peers_.timeout_s, " s for ", name(rank), ": expected exchange ",
           epoch_, ", seen ", seen, load_of(rank));
    }
    sleep_on(flag.epoch, seen);
    seen = flag.epoch.load();
  }
  flag.sleeping.store(0);
  awaited.store(0, std::memory_order_relaxed);
  arrived(rank);
}

void Exchange::wait_all() const {
  for (int i = 1; i < peers_.world; ++i) wait((peers_.rank + i) % peers_.world);
}

// "rank 3", and whom it waits for in its turn: the last one named is the one to look at.
std::string Exchange::name(int rank) const {
  std::string text = "rank " + std::to_string(rank);
  int at = rank;
  for (int hops = 1; hops < peers_.world; ++hops) {
    at = signals(peers_, at).awaited.load(std::memory_order_relaxed) - 1;
    if (at < 0 || at == peers_.rank) break;
    text += (hops == 1 ? " (which waits for rank " : ", which waits for rank ") + std::to_string(at);
  }
  return text.find('(') == std::string::npos ? text : text + ")";
}

std::string Exchange::load_of(int rank) const {
  if (!loads_.counts) return "";
  const int64_t experts = loads_.counts->shape[1], here = experts / peers_.world;
  const int32_t* counts = loads_.counts->ptr<int32_t>();
  const auto row_text = [&](int from, int to) {
    int64_t rows = 0;
    int named = 0;
    std::string by_expert;
    for (int64_t e = to * here; e < (to + 1) * here; ++e) {
      const int32_t n = counts[from * experts + e];
      rows += n;
      if (n == 0 || ++named > 8) continue;
      by_expert += (by_expert.empty() ? "" : ", ") + ("expert " + std::to_string(e) + ": " + std::to_string(n));
    }
    const int32_t tokens = loads_.tokens->ptr<int32_t>()[from * peers_.world + to];
    return std::to_string(tokens) + " tokens in " + std::to_string(rows) + " rows" +
           (by_expert.empty() ? "" : " (" + by_expert + (named > 8 ? ", ..." : "") + ")");
  };
  return "; rank " + std::to_string(rank) + " has " + row_text(rank, peers_.rank) + " for this rank, this rank has " +
         row_text(peers_.rank, rank) + " for it";
}

}  // namespace xt::cpu
