// Mutation check: every barrier of the CUDA kernels is needed. The machine passes one barrier after another as if its
// line were deleted, and some case of the tests must then fail.
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>

#include "gemm_cases.h"
#include "gemm_fp8_cases.h"

namespace xt::test {
namespace {

std::set<std::string> barriers_in_the_sources() {
  std::set<std::string> sites;
  for (const auto& file : std::filesystem::recursive_directory_iterator(XT_CUDA_SOURCES)) {
    if (!file.is_regular_file()) continue;
    std::ifstream in(file.path());
    int number = 0;
    for (std::string line; std::getline(in, line);) {
      ++number;
      if (std::regex_search(line, std::regex("^[^/]*__sync(threads|warp)\\("))) {
        sites.insert(file.path().string() + ":" + std::to_string(number));
      }
    }
  }
  return sites;
}

// More stages than a ring has, and blocks of threads with more than one tile.
void run_products(Rng& rng, int compute_capability_major) {
  cuda_host::gpu() = {compute_capability_major, 1};
  MCase m;
  m.rows = {130, 3}, m.n = 8, m.k = compute_capability_major == 8 ? 168 : 472;
  m_grouped_case(rng, m);
  KCase k;
  k.rows = {m.k, 9}, k.m = k.n = 8, k.accumulate = true;
  k_grouped_case(rng, k);
  cuda_host::gpu() = {};
}

void run_hopper_fp8_products(Rng& rng) {
  cuda_host::gpu() = {9, 1};
  MFp8Case m;
  m.rows = {3, 2}, m.k = 1024;
  m_grouped_fp8_case(rng, m);
  KFp8Case k;
  k.rows = {900, 129};
  k_grouped_fp8_case(rng, k);
  cuda_host::gpu() = {};
}

// Enough of the kernels of each source with barriers to need each of them.
const std::map<std::string, std::function<void(Rng&)>> kernels_of = {
    {"route_map.cu",
     [](Rng& rng) {
       for (int64_t experts : {3, 70, 1100}) route_map_case(rng, DType::i32, 600, 4, experts, 16);
       // One block takes two rounds only of very many choices.
       route_map_case(rng, DType::i32, 132000, 4, 8, 1);
     }},
    {"quantize_tiles.cu",
     [](Rng& rng) {
       quantize_squares_case(rng, DType::bf16, DType::e4m3, {}, 1, 128, 128);
       quantize_rowcol_case(rng, DType::bf16, DType::e4m3, {}, {130}, 0, 256);
     }},
    {"ep_prepare.cu", [](Rng& rng) { ep_case(rng, 2, DType::f32, 4, 6); }},
    {"exchange.cu", [](Rng& rng) { ep_case(rng, 2, DType::f32, 4, 1); }},
    {"exchange.h", [](Rng& rng) { ep_case(rng, 2, DType::f32, 4, 3); }},
    {"gemm_simple.cu",
     [](Rng& rng) {
       MCase m;
       m.in = m.out = DType::f32, m.rows = {3}, m.k = 40;
       m_grouped_case(rng, m);
     }},
    {"gemm_simple_fp8.cu",
     [](Rng& rng) {
       MFp8Case m;
       m.rows = {3};
       m_grouped_fp8_case(rng, m);
     }},
    {"gemm.cu", [](Rng& rng) { run_products(rng, 8); }},
    {"gemm_epilogue.h", [](Rng& rng) { run_products(rng, 8); }},
    {"gemm_m_grouped.cu", [](Rng& rng) { run_products(rng, 9); }},
    {"gemm_m_grouped_fp8.cu", run_hopper_fp8_products},
    {"gemm_k_grouped_fp8.cu", run_hopper_fp8_products},
    {"gemm_k_grouped.cu", [](Rng& rng) { run_products(rng, 9); }},
};

TEST(CudaBarriers, EveryOneIsReachedAndNeeded) {
  cuda_host::barriers_seen().clear();
  const auto run_kernels = [](const std::string& source) {
    Rng rng(5);
    kernels_of.at(source)(rng);
  };
  for (const auto& [source, run] : kernels_of) run_kernels(source);
  const std::set<std::string> all = barriers_in_the_sources();
  EXPECT_EQ(cuda_host::barriers_seen(), all);
  EXPECT_GE(all.size(), 23u);
  for (const std::string& site : all) {
    const std::string file = site.substr(0, site.rfind(':'));
    bool failed = false;
    for (unsigned seed : {0u, 1u, 3u}) {
      cuda_host::set_schedule(seed);
      cuda_host::skip_barrier(site);
      try {
        run_kernels(file.substr(file.rfind('/') + 1));
      } catch (const std::runtime_error&) {  // Violation or Mismatch
        failed = true;
        break;
      }
    }
    EXPECT_TRUE(failed) << "nothing fails without the barrier at " << site;
  }
  cuda_host::skip_barrier("");
  cuda_host::set_schedule(0);
}

}  // namespace
}  // namespace xt::test
