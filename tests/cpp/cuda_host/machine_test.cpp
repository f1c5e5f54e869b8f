// The double of the CUDA machine itself: each broken rule is found, and nothing is found in right kernels.
#include "device.h"
#include "faulty_kernels.h"

namespace xt::test {
namespace {

// What the machine says about a kernel; empty if nothing.
std::string verdict(Faulty what) {
  constexpr int64_t n = 128;
  std::vector<int32_t> values(n), out(n, -1);
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<int32_t>(2 * i + 1);
  const int32_t host = 1;
  OnMachine d;
  d.in("values", view(values, {n}));
  d.out("out", view(out, {n}));
  try {
    run_faulty(what, values.data(), out.data(), n, &host);
  } catch (const cuda_host::Violation& v) {
    return v.what();
  }
  return "";
}

TEST(CudaHost, FindsEveryBrokenRule) {
  const std::vector<std::pair<Faulty, std::string>> wanted = {
      {Faulty::past_the_end, "outside all buffers"},
      {Faulty::never_written, "of out, offset 0: never written"},
      {Faulty::writes_an_input, "of values, offset 0: write to an input"},
      {Faulty::misaligned, "16-byte read at a misaligned address"},
      {Faulty::shared_uninitialised, "uninitialised"},
      {Faulty::shared_index, "index out of bounds at"},
      {Faulty::no_block_barrier, "race with another thread's"},
      {Faulty::no_warp_barrier, "race with another thread's"},
      {Faulty::shuffle_is_no_barrier, "race with another thread's"},
      {Faulty::barrier_in_a_branch, "waits for ever at"},
      {Faulty::two_barriers, "waits for ever at"},
      {Faulty::exit_before_barrier, "waits for ever at"},
      {Faulty::shuffle_without_a_lane, "waits for ever at shuffle"},
      {Faulty::same_element, "race with another thread's write"},
      {Faulty::same_element_across_blocks, "block 1, thread 0: 4-byte write of out, offset 0: race with another"},
      {Faulty::atomic_and_plain, "race with another thread's"},
      {Faulty::overflow, "overflow of + at"},
      {Faulty::host_memory, "outside all buffers"},
  };
  for (unsigned seed : {0u, 1u, 7u}) {
    cuda_host::set_schedule(seed);
    for (const auto& [what, message] : wanted) {
      if (seed && message.find("offset 0") != std::string::npos) continue;  // another thread comes first
      const std::string said = verdict(what);
      // Where another lane's value is not there yet, it is its absence that is noticed first.
      const bool early = message == "race with another thread's" && said.find("uninitialised") != std::string::npos;
      EXPECT_TRUE(early || said.find(message) != std::string::npos)
          << "kernel " << static_cast<int>(what) << " wanted: " << message << "\n got: " << said;
    }
  }
  cuda_host::set_schedule(0);
}

TEST(CudaHost, FindsNothingInRightKernels) {
  for_each_schedule([] {
    EXPECT_EQ(verdict(Faulty::nothing), "");
    EXPECT_EQ(verdict(Faulty::warp_barrier), "");
  });
}

}  // namespace
}  // namespace xt::test
