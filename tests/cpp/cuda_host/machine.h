// Runs kernels block after block on the host, each CUDA thread as a fibre that keeps the processor until it waits.
// Every memory access of a kernel is checked (see hooks.cpp for how we learn of them); the first broken rule ends the
// launch with a Violation.
// Threads that launch kernels are devices of their own, which share memory. One of them runs at a time; another one runs
// between launches and whenever a kernel naps.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

namespace cuda_host {

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls run(call) in every thread of a grid. `call` holds the kernel's parameters, which kernels may read.
void launch(unsigned blocks, unsigned threads, size_t dynamic_shared_bytes, void* call, size_t call_bytes,
            void (*run)(void*));

// The order in which the threads of a block run between barriers: 0 ascending, 1 descending, else shuffled.
void set_schedule(unsigned seed);

// "file:line" of every barrier that a kernel has reached; and one that kernels pass as if it were not there.
std::set<std::string>& barriers_seen();
void skip_barrier(const std::string& site);  // empty: none

int& current_device();

// Held by the device that runs, and by tests that hand memory over or take it back.
std::recursive_mutex& machine_lock();

struct Gpu {
  int compute_capability_major = 8, multiprocessors = 3;
};
Gpu& gpu();
constexpr int most_shared_bytes = 227 << 10;  // per block, on Hopper
int& shared_limit(void* kernel);              // dynamic; raised by cudaFuncSetAttribute

// ---- for kernels ----
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
int lane_index();

void sync_block(const char* file, int line);
void sync_warp(const char* file, int line);
void nap();
uint64_t exchange(unsigned mask, uint64_t value, int from_lane);
unsigned ballot(unsigned mask, bool value);
unsigned match_any(unsigned mask, uint64_t value);
int32_t atomic_add(int32_t* p, int32_t v);
unsigned long long atomic_min(unsigned long long* p, unsigned long long v);

// ---- for async.cpp ----
unsigned schedule();
void fail(const std::string& what);  // ends the launch
const uint32_t* warp_clocks();        // of this thread: up to which of its clocks each lane of the warp is ordered before
void checked_access(const void* p, size_t bytes, bool write);
void wait_for_barrier(uint32_t barrier, uint32_t parity);
void wait_for_named(int id, int threads);
// Once all lanes are here, perform(what each lane passed) runs for the warp.
void warp_operation(const char* name, void* mine, void (*perform)(void* const* lanes));

// ---- for hooks.cpp ----
// `unaligned`: the compiler knows no alignment as large as the access.
void plain_access(const void* p, size_t bytes, bool write, bool unaligned);
void atomic_access(const void* p, size_t bytes);
void undefined_behaviour(const std::string& what);

}  // namespace cuda_host
