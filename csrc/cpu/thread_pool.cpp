#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace xt::cpu {
namespace {

// How long an idle worker, or a caller whose helpers are still busy, polls before it sleeps. Short, because several
// processes may share the cores.
constexpr std::chrono::microseconds spin_time{20};

constexpr int max_threads = 1024;

thread_local bool inside_task = false;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// One parallel_for; lives on its caller's stack.
struct Job {
  detail::TaskFn fn;
  void* context;
  int64_t num_tasks;
  std::atomic<int64_t> next{0};
  int open_slots = 0;           // helpers that may still join; guarded by Pool::mutex
  std::atomic<int> helpers{0};  // helpers inside; changed under Pool::mutex only
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    inside_task = true;
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) break;
      try {
        fn(context, task);
      } catch (...) {
        next.store(num_tasks, std::memory_order_relaxed);
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    inside_task = false;
  }
};

class Pool {
 public:
  const pid_t pid = getpid();

  void run(Job& job, int helpers_wanted) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers_wanted);
      job.open_slots = helpers_wanted;
      jobs_.push_back(&job);
      open_.fetch_add(1, std::memory_order_relaxed);
    }
    if (helpers_wanted == 1) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    close(job);  // from here on the number of helpers only falls
    const auto done = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
    if (done()) return;
    lock.unlock();
    spin_until(done);
    lock.lock();  // the last helper may still hold the lock in leave(); `job` must outlive that
    done_.wait(lock, done);
  }

 private:
  void grow(int wanted) {
    while (num_workers_ < wanted) {
      std::thread([this] { worker(); }).detach();
      ++num_workers_;
    }
  }

  // No helper joins any more.
  void close(Job& job) {
    const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
    if (at == jobs_.end()) return;
    jobs_.erase(at);
    open_.fetch_sub(1, std::memory_order_relaxed);
  }

  Job* join() {
    if (jobs_.empty()) return nullptr;
    Job* job = jobs_.front();
    ++job->helpers;
    if (--job->open_slots == 0) close(*job);
    return job;
  }

  void leave(Job& job) {
    if (--job.helpers == 0) done_.notify_all();
  }

  void worker() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = join();
      if (!job) {
        lock.unlock();
        const bool seen = spin_until([&] { return open_.load(std::memory_order_relaxed) > 0; });
        lock.lock();
        if (!seen) wake_.wait(lock, [&] { return !jobs_.empty(); });
        continue;
      }
      lock.unlock();
      job->work();
      lock.lock();
      leave(*job);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;    // with free slots, oldest first
  std::atomic<int> open_{0};  // jobs_.size(), readable without the lock
  int num_workers_ = 0;
};

// The pool is leaked on purpose: workers may still wait on it while the process exits. A forked child has none of its
// parent's threads, and the parent's mutex may be held for ever in it, so the child starts with a pool of its own.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* p = current.load(std::memory_order_acquire);
  while (!p || p->pid != getpid()) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *p;
}

}  // namespace

void detail::run_tasks(int num_threads, int64_t num_tasks, TaskFn fn, void* context) {
  const int64_t threads = std::min<int64_t>({num_threads, num_tasks, max_threads});
  if (threads <= 1 || inside_task) {
    for (int64_t task = 0; task < num_tasks; ++task) fn(context, task);
    return;
  }
  Job job;
  job.fn = fn;
  job.context = context;
  job.num_tasks = num_tasks;
  pool().run(job, static_cast<int>(threads) - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace xt::cpu
