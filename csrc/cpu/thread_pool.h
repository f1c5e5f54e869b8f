// The core's own threads. One pool per process, made on first use, never torn down.
#pragma once
#include <cstdint>
#include <type_traits>

namespace xt::cpu {

namespace detail {
using TaskFn = void (*)(void* context, int64_t task);
void run_tasks(int num_threads, int64_t num_tasks, TaskFn fn, void* context);
}  // namespace detail

// Calls body(task) once for each task in [0, num_tasks), on at most num_threads threads, the caller among them.
// Tasks are handed out one by one in ascending order. Returns when all are done; rethrows the first exception.
// Inside a task a further call runs serially. Any number of threads may call at once; usable in a forked child.
template <class Body>
void parallel_for(int num_threads, int64_t num_tasks, Body&& body) {
  auto call = [](void* context, int64_t task) { (*static_cast<std::remove_reference_t<Body>*>(context))(task); };
  detail::run_tasks(num_threads, num_tasks, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// Splits [0, n) into runs of `grain` and calls body(begin, end) for each of them in parallel.
template <class Body>
void parallel_ranges(int num_threads, int64_t n, int64_t grain, Body&& body) {
  parallel_for(num_threads, (n + grain - 1) / grain, [&](int64_t task) {
    const int64_t begin = task * grain;
    body(begin, begin + grain < n ? begin + grain : n);
  });
}

}  // namespace xt::cpu
