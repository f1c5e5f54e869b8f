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

Exchange::Exchange(EpOp op, const Peers& peers, const Tensor* counts)
    : op_(op), peers_(peers), counts_(counts), exceptions_(std::uncaught_exceptions()) {
  Signals& own = signals(peers, peers.rank);
  const uint32_t failed = own.failed.load(std::memory_order_relaxed);
  if (failed) fail(name_of(op), ": rank ", peers.rank, " gave this group up in exchange ", failed, "; make a new group");
  epoch_ = own.epoch.load(std::memory_order_relaxed) + 1;
  if (epoch_ == 0) epoch_ = 2;  // 0 means that nothing has been published; the areas still take turns
  own.epoch.store(epoch_, std::memory_order_relaxed);
}

Exchange::~Exchange() {
  if (std::uncaught_exceptions() > exceptions_) {
    uint32_t none = 0;  // of two exchanges of one op, the later is destroyed, and so speaks, first
    signals(peers_, peers_.rank).failed.compare_exchange_strong(none, epoch_);
  }
}

void Exchange::meet() const {
  publish();
  int first = -1;
  if (missing(&first) == 0 || spin()) return;
  sleep();
}

void Exchange::publish() const {
  for (int i = 1; i < peers_.world; ++i) {
    const int r = (peers_.rank + i) % peers_.world;
    Signals& theirs = signals(peers_, r);
    Signals::Flag& flag = theirs.from[peers_.rank];
    flag.op[epoch_ & 1].store(op_, std::memory_order_relaxed);
    flag.epoch.store(epoch_, std::memory_order_release);
    // Sequentially consistent, like the sleeper's accesses: either it sees this arrival or we see it sleeping.
    const uint32_t arrivals = theirs.arrivals.fetch_add(1) + 1;
    if (theirs.sleeping.load() && reached(arrivals, theirs.wake_at.load())) wake(theirs.arrivals);
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

// How many ranks have not come yet, and the next of them.
int Exchange::missing(int* first) const {
  int count = 0;
  for (int i = peers_.world - 1; i > 0; --i) {
    const int r = (peers_.rank + i) % peers_.world;
    if (arrived(r)) continue;
    *first = r;
    ++count;
  }
  return count;
}

bool Exchange::spin() const {
  static const int cores = static_cast<int>(std::thread::hardware_concurrency());
  if (cores < peers_.world) return false;  // the others need this core
  const auto end = Clock::now() + spin_time;
  int first;
  do {
    for (int i = 0; i < 16; ++i) {
      if (missing(&first) == 0) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

void Exchange::sleep() const {
  Signals& own = signals(peers_, peers_.rank);
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(peers_.timeout_s));
  const auto give_up = [&](const auto&... reason) {
    own.sleeping.store(0);
    fail(name_of(op_), ": rank ", peers_.rank, reason...);
  };
  for (;;) {
    // A rank may be an exchange ahead and count for one that is not here yet: then we wake too early, and look again.
    uint32_t seen = own.arrivals.load();
    int rank = -1;
    const int count = missing(&rank);
    if (count == 0) break;
    own.awaited.store(rank + 1, std::memory_order_relaxed);
    own.wake_at.store(seen + static_cast<uint32_t>(count));
    own.sleeping.store(1);
    const uint32_t failed = signals(peers_, rank).failed.load(std::memory_order_relaxed);
    if (failed && !arrived(rank)) give_up(" waits for ", name(rank), ", which gave up in exchange ", failed, load_of(rank));
    if (Clock::now() >= end) {
      give_up(" waited ", peers_.timeout_s, " s for ", name(rank), ": expected exchange ", epoch_, ", seen ",
              own.from[rank].epoch.load(), load_of(rank));
    }
    seen = own.arrivals.load();
    if (!reached(seen, own.wake_at.load())) sleep_on(own.arrivals, seen);
  }
  own.sleeping.store(0);
  own.awaited.store(0, std::memory_order_relaxed);
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
  if (!counts_) return "";
  const int64_t experts = counts_->shape[1], here = experts / peers_.world;
  const int32_t* counts = counts_->ptr<int32_t>();
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
    return std::to_string(rows) + " rows" +
           (by_expert.empty() ? "" : " (" + by_expert + (named > 8 ? ", ..." : "") + ")");
  };
  return "; rank " + std::to_string(rank) + " has " + row_text(rank, peers_.rank) + " for this rank, this rank has " +
         row_text(peers_.rank, rank) + " for it";
}

}  // namespace xt::cpu
