// How ranks wait for each other on GPUs: one exchange is "everybody writes, tells everybody, waits for everybody".
//
// The number of the current exchange lives in the device's memory, so that a replayed CUDA graph goes on counting.
// Kernels put on the stream before `exchange` write for the exchange to come, those after it read what that one brought.
// Two index areas in turn are enough: a rank that writes for exchange n + 2 has seen everybody publish n + 1, so
// everybody's kernels that read what n left are done.
#pragma once
#include "cuda/rows.h"
#include "xtuner/peers.h"

namespace xt::cuda {

// Blocks of a kernel that moves rows between ranks: few, so that other work runs beside it, and enough loads in flight
// for the links between GPUs.
constexpr int64_t exchange_blocks = 32;

inline int64_t few_blocks(int64_t threads) {
  return std::min(exchange_blocks, (threads + block_threads - 1) / block_threads);
}

// The signal page of a rank.
struct Signals {
  struct alignas(64) Flag {
    uint32_t epoch;  // the last exchange that this source has published to the page's owner
    uint32_t op[2];  // what the source did in its last even and its last odd exchange
  };
  Flag from[max_peers];
  alignas(64) uint32_t failed;  // the exchange in which the owner gave up; 0: none
  uint32_t epoch;               // the owner's current exchange; nobody else reads it
};
static_assert(sizeof(Signals) <= signal_bytes);

// How a rank tells the others about a tensor of two dims in its data area.
struct Shown {
  int64_t begin = 0, rows = 0, row_bytes = 0;  // begin: bytes from the data area's

  Shown() = default;
  Shown(const Peers& peers, const Tensor& t)
      : begin(t.numel() ? t.ptr<char>() - peers.data(peers.rank) : 0),
        rows(t.shape[0]),
        row_bytes(t.shape[1] * size_of(t.dtype)) {}
};

enum class EpOp : uint32_t { prepare = 1, dispatch, combine, combine_bwd };

// Publishes to all ranks what earlier kernels of the stream wrote, and where these tensors are; then waits for all ranks:
// at most peers.timeout_s, then (or where a rank has given up, or is in another op) this rank gives up as well and notes
// it. Later exchanges of a rank that gave up do not wait.
void exchange(const char* name, EpOp op, const Peers& peers, Stream stream);
void exchange(const char* name, EpOp op, const Peers& peers, const Shown& first, const Shown& second, Stream stream);

__device__ inline Signals& signals(const Peers& peers, int rank) { return *static_cast<Signals*>(peers.signal[rank]); }
__device__ inline uint32_t following(uint32_t epoch) { return epoch == ~0u ? 2 : epoch + 1; }  // 0: nothing published
__device__ inline uint32_t coming_exchange(const Peers& peers) { return following(signals(peers, peers.rank).epoch); }
__device__ inline uint32_t current_exchange(const Peers& peers) { return signals(peers, peers.rank).epoch; }

__device__ inline char* index_area(const Peers& peers, int rank, uint32_t epoch) {
  return static_cast<char*>(peers.block[rank]) + (epoch & 1) * peers.index_bytes;
}

// The tensor of a rank; no rows where what the rank has shown is not inside its data area.
struct PeerRows {
  char* data;
  int64_t rows, row_bytes;
};

// Fills `table` with the tensors that all ranks have shown. All threads of the block call it together.
__device__ inline void load_table(const Peers& peers, int which, PeerRows* table) {
  const uint32_t epoch = current_exchange(peers);
  for (int p = threadIdx.x; p < peers.world; p += blockDim.x) {
    const Shown* shown = reinterpret_cast<const Shown*>(index_area(peers, p, epoch)) + which;
    const int64_t begin = shown->begin, rows = shown->rows, row_bytes = shown->row_bytes;
    const bool good = begin >= 0 && begin % 16 == 0 && rows >= 0 && row_bytes >= 0 && begin <= peers.data_bytes &&
                      (row_bytes == 0 || rows <= (peers.data_bytes - begin) / row_bytes);
    table[p].data = static_cast<char*>(peers.block[p]) + 2 * peers.index_bytes + begin;
    table[p].rows = good ? rows : 0;
    table[p].row_bytes = row_bytes;
  }
  __syncthreads();
}

// The rank and row of each choice.
struct Dest {
  const int32_t* pairs;  // [T, K, 2]
  int64_t choices;
  uint32_t num_experts_per_tok;

  explicit Dest(const Tensor& dest)
      : pairs(dest.ptr<int32_t>()), choices(dest.numel() / 2), num_experts_per_tok(static_cast<uint32_t>(dest.shape[1])) {}

  // Where the choice's row of `row_bytes` is, or null where the choice is dropped, or wrong, which is noted.
  __device__ char* row(int64_t choice, const PeerRows* table, int world, int64_t row_bytes, uint64_t* fault) const {
    const int32_t p = __ldg(pairs + 2 * choice);
    if (p == -1) return nullptr;
    const int64_t row = __ldg(pairs + 2 * choice + 1);
    if (p >= 0 && p < world && row >= 0 && row < table[p].rows && table[p].row_bytes == row_bytes) {
      return table[p].data + row * row_bytes;
    }
    note(fault, Fault::ep_dest, choice);
    return nullptr;
  }
};

// Rows of this rank's experts, of which there is room for `capacity`. All lanes of a warp call it together.
struct RowsHere {
  const int32_t* counts;  // i32 [W, E]
  int world, rank, experts;
  int64_t capacity;

  RowsHere(const Tensor& counts, const Peers& peers, int64_t capacity)
      : counts(counts.ptr<int32_t>()),
        world(peers.world),
        rank(peers.rank),
        experts(static_cast<int>(counts.shape[1])),
        capacity(capacity) {}

  __device__ int64_t get() const {
    const int here = experts / world;
    int64_t rows = 0;
    for (int i = lane(); i < experts; i += warp_size) rows += __ldg(counts + i / here * experts + rank * here + i % here);
    rows = __shfl_sync(all_lanes, inclusive_sum(rows), warp_size - 1);
    return max(int64_t{0}, min(rows, capacity));
  }
};

// Zeroes the rows of `rows` [R, H] that no choice fills.
void zero_unused_rows(const char* name, const Tensor& rows, const Tensor& counts, const Peers& peers, Stream stream);

// Calls body(Unit{}) with the widest access that divides row_bytes.
template <class Body>
void with_units(int64_t row_bytes, const Body& body) {
  if (row_bytes % 16 == 0) return body(uint4{});
  if (row_bytes % 4 == 0) return body(uint32_t{});
  row_bytes % 2 == 0 ? body(uint16_t{}) : body(uint8_t{});
}

inline int64_t row_bytes(const Tensor& t) { return t.shape[1] * size_of(t.dtype); }

}  // namespace xt::cuda
