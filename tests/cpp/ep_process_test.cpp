// The expert-parallel ops between processes: handshake, long runs with skewed loads, and ranks that are killed.
#include <dirent.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <set>
#include <thread>

#include "ep_cases.h"
#include "xtuner/shared_memory.h"

namespace xt::test {
namespace {

// What the forked ranks of one test have in common: an all-gather of short messages, and what each has to report.
struct Board {
  static constexpr int max_ranks = 8, max_message = 1000;
  struct Message {
    int size;
    char bytes[max_message];
  };
  std::atomic<int> written[4];
  Message messages[4][max_ranks];
  char errors[max_ranks][max_message];
  std::atomic<int> steps[max_ranks];

  static Board* make() {
    void* at = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : new (at) Board();
  }
  AllGather all_gather(int rank, int world) {
    return [this, rank, world, round = 0](const std::string& mine) mutable {
      Message& m = messages[round][rank];
      m.size = static_cast<int>(std::min<size_t>(mine.size(), max_message));
      std::memcpy(m.bytes, mine.data(), m.size);
      ++written[round];
      while (written[round] < world) std::this_thread::yield();
      std::vector<std::string> all;
      for (int r = 0; r < world; ++r) all.emplace_back(messages[round][r].bytes, messages[round][r].size);
      ++round;
      return all;
    };
  }
};

// Ranks as child processes. body(rank) returns when the rank is done; an Error it throws is kept on the board.
class Processes {
 public:
  Processes(int world, const std::function<void(int, Board&)>& body) : board(*Board::make()), world_(world) {
    for (int rank = 0; rank < world; ++rank) {
      const pid_t pid = fork();
      if (pid == 0) {
        try {
          body(rank, board);
          _exit(0);
        } catch (const std::exception& e) {
          std::strncpy(board.errors[rank], e.what(), Board::max_message - 1);
          _exit(1);
        }
      }
      pids_.push_back(pid);
    }
  }
  ~Processes() {
    wait();
    munmap(&board, sizeof(Board));
  }
  // Exit status of every rank: 0 fine, 1 error, -9 killed.
  std::vector<int> wait() {
    for (size_t i = status_.size(); i < pids_.size(); ++i) {
      int status = 0;
      waitpid(pids_[i], &status, 0);
      status_.push_back(WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
    }
    return status_;
  }
  void kill(int rank) const { ::kill(pids_[rank], SIGKILL); }
  void expect_all_fine() {
    const auto status = wait();
    for (int r = 0; r < world_; ++r) EXPECT_EQ(status[r], 0) << "rank " << r << ": " << board.errors[r];
  }

  Board& board;

 private:
  int world_;
  std::vector<pid_t> pids_;
  std::vector<int> status_;
};

std::set<std::string> shared_memory_names() {
  std::set<std::string> names;
  DIR* dir = opendir("/dev/shm");
  for (dirent* entry = dir ? readdir(dir) : nullptr; entry; entry = readdir(dir)) names.insert(entry->d_name);
  if (dir) closedir(dir);
  return names;
}

// Steps with loads that every rank draws alike; each compares its own result with the local one.
void run_steps(int rank, int world, int steps, const Peers& peers, Board& board) {
  Rng rng(17);
  for (int step = 0; step < steps; ++step) {
    const auto loads = random_loads(rng, world, step % 2 ? DType::bf16 : DType::f32, 1 + step % 40);
    if (!(ep_step(loads[rank], peers) == local_step(loads[rank]))) {
      fail("rank ", rank, ": other bits than one rank alone, in step ", step);
    }
    board.steps[rank] = step + 1;
  }
}

class EpProcesses : public testing::TestWithParam<int> {};

TEST_P(EpProcesses, SameBitsInEveryStep) {
  const int world = GetParam();
  Processes ranks(world, [&](int rank, Board& board) {
    const SharedMemory memory(rank, world, 16 << 20, 60, board.all_gather(rank, world));
    run_steps(rank, world, 60, memory.peers(), board);
  });
  ranks.expect_all_fine();
}

INSTANTIATE_TEST_SUITE_P(Worlds, EpProcesses, testing::Values(1, 2, 4, 8));

TEST(EpProcess, AThousandSkewedStepsWithoutAStall) {
  Processes ranks(4, [&](int rank, Board& board) {
    const SharedMemory memory(rank, 4, 16 << 20, 60, board.all_gather(rank, 4));
    run_steps(rank, 4, 1000, memory.peers(), board);
  });
  ranks.expect_all_fine();
}

TEST(EpProcess, AKilledRankIsAnErrorForTheOthersAndLeavesNothing) {
  const auto before = shared_memory_names();
  constexpr double bound = 2;
  Processes ranks(4, [&](int rank, Board& board) {
    const SharedMemory memory(rank, 4, 16 << 20, bound, board.all_gather(rank, 4));
    run_steps(rank, 4, 1 << 30, memory.peers(), board);
  });
  while (ranks.board.steps[2] < 5) std::this_thread::yield();
  ranks.kill(2);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(ranks.wait(), (std::vector<int>{1, 1, -SIGKILL, 1}));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_LT(took.count(), bound + 8);  // the machine may be busy
  for (int r : {0, 1, 3}) {
    const std::string error = ranks.board.errors[r];
    EXPECT_NE(error.find("rank 2"), std::string::npos) << error;  // directly, or "rank 0 (which waits for rank 2)"
  }
  EXPECT_EQ(shared_memory_names(), before);
}

TEST(EpProcess, RanksKilledInTheHandshakeLeaveNothing) {
  const auto before = shared_memory_names();
  for (int fatal_round : {0, 1}) {  // before anybody is mapped; with everybody mapped but not yet told so
    Processes ranks(2, [&](int rank, Board& board) {
      const AllGather gather = board.all_gather(rank, 2);
      int round = 0;
      const SharedMemory memory(rank, 2, 1 << 20, 1, [&](const std::string& mine) {
        if (round++ == fatal_round) raise(SIGKILL);
        return gather(mine);
      });
    });
    EXPECT_EQ(ranks.wait(), (std::vector<int>{-SIGKILL, -SIGKILL}));
  }
  EXPECT_EQ(shared_memory_names(), before);
}

TEST(EpProcess, RanksMustAgreeAndBeReachable) {
  Processes ranks(2, [&](int rank, Board& board) {
    const SharedMemory memory(rank, 2, rank == 0 ? 4096 : 8192, 1, board.all_gather(rank, 2));
  });
  EXPECT_EQ(ranks.wait(), (std::vector<int>{1, 1}));
  for (int r : {0, 1}) {
    EXPECT_STREQ(ranks.board.errors[r],
                 "SharedMemory: rank 0: data_bytes must be the same on every rank, but is 4096 here and 8192 on rank 1");
  }
  const AllGather liar = [](const std::string& mine) {
    if (mine.empty() || mine.size() > 100) return std::vector<std::string>{mine, ""};
    std::string other = mine;
    const int64_t fd = 1 << 20;
    other.replace(8, 8, reinterpret_cast<const char*>(&fd), 8);
    return std::vector<std::string>{mine, other};
  };
  expect_error([&] { const SharedMemory memory(0, 2, 4096, 1, liar); }, "cannot be opened: No such file or directory; all ranks must run on one machine, as one user");
  const AllGather alone = [](const std::string& mine) { return std::vector<std::string>{mine}; };
  expect_error([&] { const SharedMemory memory(2, 2, 4096, 1, alone); }, "rank must be in [0, world=2), got 2");
  expect_error([&] { const SharedMemory memory(0, 1, 4096, 0, alone); }, "timeout_s must be positive, got 0");
}

}  // namespace
}  // namespace xt::test
