#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

namespace xt::cpu {
namespace {

void expect_each_task_once(int threads, int64_t tasks) {
  std::vector<std::atomic<int>> seen(tasks);
  parallel_for(threads, tasks, [&](int64_t i) { ++seen[i]; });
  for (int64_t i = 0; i < tasks; ++i) ASSERT_EQ(seen[i], 1) << "task " << i << " of " << tasks << ", " << threads << " threads";
}

TEST(ThreadPool, RunsEachTaskOnce) {
  for (int threads : {0, 1, 2, 3, 8, 40}) {
    for (int64_t tasks : {0, 1, 2, 7, 1000}) expect_each_task_once(threads, tasks);
  }
}

TEST(ThreadPool, RangesCoverEverything) {
  for (int64_t n : {0, 1, 9, 10, 11, 100}) {
    std::vector<std::atomic<int>> seen(n);
    parallel_ranges(3, n, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++seen[i];
    });
    for (auto& s : seen) EXPECT_EQ(s, 1);
  }
}

TEST(ThreadPool, WritesAreVisibleToTheCaller) {
  std::vector<int64_t> plain(64);  // not atomic: the return of parallel_for must order these writes
  for (int64_t round = 1; round <= 500; ++round) {
    parallel_for(4, 64, [&](int64_t i) { plain[i] += i; });
    for (int64_t i = 0; i < 64; ++i) ASSERT_EQ(plain[i], i * round);
  }
}

TEST(ThreadPool, UsesNoMoreThreadsThanAllowed) {
  std::atomic<int> inside{0}, most{0};
  parallel_for(3, 60, [&](int64_t) {
    const int now = ++inside;
    int seen = most;
    while (now > seen && !most.compare_exchange_weak(seen, now)) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    --inside;
  });
  EXPECT_LE(most, 3);
  EXPECT_GE(most, 2) << "the helpers never came";
}

TEST(ThreadPool, ManyCallersAtOnce) {
  std::vector<std::thread> callers;
  for (int c = 0; c < 6; ++c) {
    callers.emplace_back([c] {
      for (int i = 0; i < 100; ++i) expect_each_task_once(1 + (c + i) % 4, 5 + i);
    });
  }
  for (std::thread& t : callers) t.join();
}

TEST(ThreadPool, NestedCallsRunSerially) {
  std::atomic<int> total{0};
  parallel_for(4, 8, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    parallel_for(4, 16, [&](int64_t) {
      EXPECT_EQ(std::this_thread::get_id(), self);
      ++total;
    });
  });
  EXPECT_EQ(total, 128);
}

TEST(ThreadPool, ExceptionReachesTheCallerAndThePoolSurvives) {
  for (int threads : {1, 4}) {
    const auto call = [&] {
      parallel_for(threads, 100, [](int64_t i) {
        if (i == 13) throw std::runtime_error("thirteen");
      });
    };
    EXPECT_THROW(call(), std::runtime_error);
    expect_each_task_once(threads, 50);
  }
}

TEST(ThreadPool, WorksInAForkedChild) {
  expect_each_task_once(4, 100);  // the parent's pool exists
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int> total{0};
    parallel_for(4, 100, [&](int64_t) { ++total; });
    _exit(total == 100 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  expect_each_task_once(4, 100);
}

}  // namespace
}  // namespace xt::cpu
