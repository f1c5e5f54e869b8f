// Quantizing 128 x 128 tiles both ways round from one read: a block of threads keeps a tile in registers, and turns its
// codes around in shared memory.
#include "cuda/cuda.h"
#include "cuda/fp8.h"
#include "cuda/gemm.h"

namespace xt::cuda {
namespace {

constexpr int rows_at_once = 16;
constexpr int per_thread = fp8_block / rows_at_once;
constexpr int row_words = fp8_block / 4;
constexpr int tiles_per_block = 8;  // side by side, of one block of rows

// How the threads of a block share a tile: thread t has `N` neighbouring columns of rows t / lanes + 16 j.
template <class T>
struct TileThreads {
  static constexpr int N = wide<T>, lanes = fp8_block / N, threads = rows_at_once * lanes;
  static constexpr int min_blocks = 512 / threads;  // on one multiprocessor: at most 128 registers, 64 KiB of loads
  int row = static_cast<int>(threadIdx.x) / lanes, unit = static_cast<int>(threadIdx.x) % lanes;
};

// Word w of row r, at a place that lets the lanes of a warp read the words of 16 rows without conflicts of banks.
__device__ inline int turned(int row, int word) { return row * row_words + (word ^ row / 16 * 4); }

template <int N>
__device__ void keep_codes(uint32_t* tile, int row, int unit, typename Codes<N>::Bits codes) {
  uint32_t words[N / 4];
  Codes<N>::words(codes, words);
#pragma unroll
  for (int w = 0; w < N / 4; ++w) tile[turned(row, unit * (N / 4) + w)] = words[w];
}

// Bytes j of four words become word j.
__device__ inline void turn_words(const uint32_t* in, uint32_t* out) {
  const uint32_t low = __byte_perm(in[0], in[1], 0x5140), low2 = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t high = __byte_perm(in[0], in[1], 0x7362), high2 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low, low2, 0x5410);
  out[1] = __byte_perm(low, low2, 0x7632);
  out[2] = __byte_perm(high, high2, 0x5410);
  out[3] = __byte_perm(high, high2, 0x7632);
}

// The tile's columns become rows of `to`, whose rows are `row` 16-byte units long. A thread takes 4 columns of 16 rows;
// eight lanes write a whole line.
__device__ inline void store_turned(const uint32_t* tile, uint4* to, int64_t row) {
  for (int i = threadIdx.x; i < 2 * fp8_block; i += blockDim.x) {
    const int part = i % 8, word = i / 8;
    uint32_t columns[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t in[4], out[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) in[k] = tile[turned(part * 16 + r * 4 + k, word)];
      turn_words(in, out);
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[c][r] = out[c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      to[(word * 4 + c) * row + part] = {columns[c][0], columns[c][1], columns[c][2], columns[c][3]};
    }
  }
}

// One tile of a weight matrix [E, N, K] per block of threads.
template <class T, class F>
__global__ void __launch_bounds__(TileThreads<T>::threads, TileThreads<T>::min_blocks)
    quantize_square_kernel(const uint4* __restrict__ w, ScaleRule rule,
                           typename Codes<wide<T>>::Bits* __restrict__ q, uint4* __restrict__ qt,
                           float* __restrict__ scale, uint32_t num_n, uint32_t num_k) {
  constexpr int N = wide<T>, warps = TileThreads<T>::threads / warp_size;
  __shared__ uint32_t largest[warps];
  __shared__ uint32_t codes[fp8_block * row_words];
  const TileThreads<T> t;
  const uint32_t tiles_k = num_k / fp8_block, tiles_n = num_n / fp8_block;
  const uint32_t col = blockIdx.x % tiles_k, row = blockIdx.x / tiles_k;  // row: of the tiles of all experts
  const int64_t units = num_k / N, first = (int64_t{row} * fp8_block + t.row) * units + col * t.lanes + t.unit;
  uint4 bits[per_thread];
#pragma unroll
  for (int j = 0; j < per_thread; ++j) bits[j] = __ldg(w + first + j * rows_at_once * units);
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < per_thread; ++j) {
    float v[N];
    Access<T, N>::widen(bits[j], v);
#pragma unroll
    for (int n = 0; n < N; ++n) most = max(most, magnitude(v[n]));
  }
  most = largest_of_lanes<warp_size>(most);
  if (lane() == 0) largest[threadIdx.x / warp_size] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < warps; ++i) most = max(most, largest[i]);
  const float s = rule.scale<F>(most);
  if (threadIdx.x == 0) scale[blockIdx.x] = s;
#pragma unroll
  for (int j = 0; j < per_thread; ++j) {
    float v[N];
    Access<T, N>::widen(bits[j], v);
    const auto code = quantize<F, N>(v, s);
    q[first + j * rows_at_once * units] = code;
    keep_codes<N>(codes, t.row + j * rows_at_once, t.unit, code);
  }
  __syncthreads();
  const int64_t expert = row / tiles_n, row_t = num_n / 16;
  store_turned(codes, qt + (expert * num_k + col * fp8_block) * row_t + row % tiles_n * (fp8_block / 16), row_t);
}

// At most 128 rows of one expert; none past the last expert.
struct RowBlock {
  int64_t first;
  int count;
};

struct Experts {
  const int64_t* offsets;
  int count;

  // Block `index` of all experts' blocks. All lanes of a warp call it together. Experts from the first on whose offsets
  // do not ascend have no rows, so that no row has two writers.
  __device__ RowBlock block(int index, int64_t used, uint64_t* fault) const {
    int before = 0;
    for (int first = 0; first < count; first += warp_size) {
      const int e = first + lane();
      const int64_t from = e < count ? __ldg(offsets + e) : 0, to = e < count ? __ldg(offsets + e + 1) : 0;
      const bool bad = from < 0 || from > to;
      if (bad) note(fault, Fault::offsets_order, e);
      const int good = __ffs(__ballot_sync(all_lanes, bad)) - 1;  // lanes before a bad one; -1: all
      const int64_t begin = from, end = good < 0 || lane() < good ? min(to, used) : 0;
      const int blocks = begin < end ? static_cast<int>((end - begin + fp8_block - 1) / fp8_block) : 0;
      const int up_to = before + inclusive_sum(blocks);
      const unsigned reached = __ballot_sync(all_lanes, index < up_to);
      if (reached) {
        const int owner = __ffs(reached) - 1;
        const int64_t at = __shfl_sync(all_lanes, begin + int64_t{index - (up_to - blocks)} * fp8_block, owner);
        const int64_t last = __shfl_sync(all_lanes, end, owner);
        return {at, static_cast<int>(min(int64_t{fp8_block}, last - at))};
      }
      if (good >= 0) break;
      before = __shfl_sync(all_lanes, up_to, warp_size - 1);
    }
    return {0, 0};
  }
};

// The outputs of quantize_rowcol.
template <int N>
struct RowCol {
  typename Codes<N>::Bits* q;
  float* scale;
  uint4* qt;
  float* scale_t;
  int64_t rows, ld, units, hidden, row_t;  // units: of a row of q; row_t: 16-byte units of a row of qt
  int blocks_t;                            // P / 128
};

// q and scale of rows from `first` on, at most 128 of them, are zero.
template <class T>
__device__ void zero_tail(const RowCol<wide<T>>& out, int64_t first, int col, const TileThreads<T>& t) {
  for (int64_t row = first + t.row; row < min(first + fp8_block, out.ld); row += rows_at_once) {
    if (row < out.rows) out.q[row * out.units + col * t.lanes + t.unit] = {};
    if (t.unit == 0) out.scale[col * out.ld + row] = 0.0f;
  }
}

// A tile's rows: their scales and codes, and this thread's largest values of its columns.
template <class T, class F>
__device__ void quantize_tile_rows(const uint4* bits, const RowBlock& block, ScaleRule rule,
                                   const RowCol<wide<T>>& out, int col, const TileThreads<T>& t, uint32_t* columns) {
  constexpr int N = wide<T>;
#pragma unroll
  for (int j = 0; j < per_thread; ++j) {
    float v[N];
    Access<T, N>::widen(bits[j], v);
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      largest = max(largest, magnitude(v[n]));
      columns[n] = max(columns[n], magnitude(v[n]));
    }
    const float s = rule.scale<F>(largest_of_lanes<TileThreads<T>::lanes>(largest));
    const int row = t.row + j * rows_at_once;
    if (row >= block.count) continue;
    out.q[(block.first + row) * out.units + col * t.lanes + t.unit] = quantize<F, N>(v, s);
    if (t.unit == 0) out.scale[col * out.ld + block.first + row] = s;
  }
}

// A tile's columns, given the inverse of each column's scale (NaN where that is no finite number), into shared memory.
template <class T, class F>
__device__ void quantize_tile_columns(const uint4* bits, int count, const float* inverses, const TileThreads<T>& t,
                                      uint32_t* codes) {
  constexpr int N = wide<T>;
  float inverse[N];
  uint32_t nans[N / 4] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    inverse[n] = inverses[t.unit * N + n];
    if (!is_finite(inverse[n])) nans[n / 4] |= 0xffu << n % 4 * 8;
  }
#pragma unroll
  for (int j = 0; j < per_thread; ++j) {
    float v[N];
    Access<T, N>::widen(bits[j], v);
    const int row = t.row + j * rows_at_once;
    uint32_t words[N / 4];
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] *= inverse[n];
#pragma unroll
    for (int w = 0; w < N / 4; ++w) {
      const uint32_t code = (encode_word<F>(v + 4 * w) & ~nans[w]) | (fp8_nans & nans[w]);
      words[w] = row < count ? code : 0;
    }
    keep_codes<N>(codes, row, t.unit, Codes<N>::of(words));
  }
}

// Sources of the numbers: unit `unit` (16 bytes) of a row of what is quantized, which is found at `place`; none: zeros.
constexpr int64_t nowhere = -1;

template <class T>
struct PlainRows {
  const uint4* x;
  int64_t units;

  __device__ int64_t place(int64_t row) const { return row; }
  __device__ uint4 load(int64_t place, int64_t unit) const { return __ldg(x + place * units + unit); }
};

template <class T>
struct GatheredRows {
  const uint4* x;
  int64_t units;
  RowMap map;
  uint64_t* fault;

  __device__ int64_t place(int64_t row) const { return map.line(row, fault); }
  __device__ uint4 load(int64_t place, int64_t unit) const { return __ldg(x + place * units + unit); }
};

template <class T>
struct ActivatedRows {
  const uint4* x;
  int64_t units;  // of a row of gates
  Swiglu f;

  __device__ int64_t place(int64_t row) const { return row; }
  __device__ uint4 load(int64_t place, int64_t unit) const {
    constexpr int N = wide<T>;
    const uint4 *gates = x + place * 2 * units + unit, gate = __ldg(gates), up = __ldg(gates + units);
    float g[N], u[N];
    Access<T, N>::widen(gate, g);
    Access<T, N>::widen(up, u);
#pragma unroll
    for (int n = 0; n < N; ++n) g[n] = f.forward(g[n], u[n]);
    return Access<T, N>::narrow(g);
  }
};

// A block of threads takes some tiles of one block of rows; and it zeroes as much of what lies past the last row.
template <class T, class F, class Source>
__global__ void __launch_bounds__(TileThreads<T>::threads, TileThreads<T>::min_blocks)
    quantize_rowcol_kernel(Source x, Experts experts, UsedRows used_rows, ScaleRule rule,
                           RowCol<wide<T>> out, int parts, uint64_t* fault) {
  constexpr int N = wide<T>, lanes = TileThreads<T>::lanes, warps = TileThreads<T>::threads / warp_size;
  __shared__ uint32_t largest[warps][fp8_block];
  __shared__ float inverses[fp8_block];
  __shared__ uint32_t codes[fp8_block * row_words];
  const TileThreads<T> t;
  const int index = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) % parts;
  const int end = min((part + 1) * tiles_per_block, static_cast<int>(out.hidden / fp8_block));
  const int64_t used = used_rows.get(fault);
  const RowBlock block = experts.block(index, used, fault);
  int64_t places[per_thread];
#pragma unroll
  for (int j = 0; j < per_thread; ++j) {
    const int row = t.row + j * rows_at_once;
    places[j] = row < block.count ? x.place(block.first + row) : nowhere;
  }
  for (int col = part * tiles_per_block; col < end; ++col) {
    zero_tail<T>(out, used + int64_t{index} * fp8_block, col, t);
    if (index >= out.blocks_t) continue;
    uint4 bits[per_thread] = {};
#pragma unroll
    for (int j = 0; j < per_thread; ++j) {
      if (places[j] != nowhere) bits[j] = x.load(places[j], col * lanes + t.unit);
    }
    uint32_t columns[N] = {};
    quantize_tile_rows<T, F>(bits, block, rule, out, col, t, columns);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (lanes < warp_size) columns[n] = max(columns[n], __shfl_xor_sync(all_lanes, columns[n], warp_size / 2));
      if (lane() < lanes) largest[threadIdx.x / warp_size][t.unit * N + n] = columns[n];
    }
    __syncthreads();
    if (threadIdx.x < fp8_block) {
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < warps; ++i) most = max(most, largest[i][threadIdx.x]);
      const float s = rule.scale<F>(most);
      inverses[threadIdx.x] = is_finite(s) ? 1.0f / s : __uint_as_float(0x7fc00000u);
      out.scale_t[index * out.hidden + col * fp8_block + threadIdx.x] = block.count ? s : 0.0f;
    }
    __syncthreads();
    quantize_tile_columns<T, F>(bits, block.count, inverses, t, codes);
    __syncthreads();
    store_turned(codes, out.qt + int64_t{col} * fp8_block * out.row_t + index * (fp8_block / 16), out.row_t);
  }
}

// source(T{}) makes the source of the numbers, of type T.
template <class MakeSource>
void rowcol(const char* op, DType from, const Tensor& offsets, QuantizeParams params, const Tensor& q,
            const Tensor& scale, const Tensor& qt, const Tensor& scale_t, Stream stream, const MakeSource& source) {
  const OnDevice guard(op, q);
  const int64_t rows = q.shape[0], hidden = q.shape[1], blocks_t = scale_t.shape[0];
  const int64_t parts = (hidden / fp8_block + tiles_per_block - 1) / tiles_per_block;
  const int64_t blocks = std::max(blocks_t, (rows + fp8_block - 1) / fp8_block);
  with_formats(from, q.dtype, [&](auto element, auto format) {
    using T = decltype(element);
    using F = decltype(format);
    const RowCol<wide<T>> out = {q.ptr<typename Codes<wide<T>>::Bits>(),
                                 scale.ptr<float>(),
                                 qt.ptr<uint4>(),
                                 scale_t.ptr<float>(),
                                 rows,
                                 scale.shape[1],
                                 hidden / wide<T>,
                                 hidden,
                                 qt.shape[1] / 16,
                                 static_cast<int>(blocks_t)};
    const Experts experts = {offsets.ptr<int64_t>(), static_cast<int>(offsets.shape[0] - 1)};
    const auto x = source(T{});
    launch(op, stream, blocks * parts, TileThreads<T>::threads, quantize_rowcol_kernel<T, F, std::decay_t<decltype(x)>>, x,
           experts, UsedRows(&offsets, rows), ScaleRule(params), out, parts, stream.fault);
  });
}

}  // namespace

void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      Stream stream) {
  const OnDevice guard("quantize_128x128", w);
  with_formats(w.dtype, q.dtype, [&](auto element, auto format) {
    using T = decltype(element);
    using F = decltype(format);
    launch("quantize_128x128", stream, scale.numel(), TileThreads<T>::threads, quantize_square_kernel<T, F>,
           w.ptr<uint4>(), ScaleRule(params), q.ptr<typename Codes<wide<T>>::Bits>(), qt.ptr<uint4>(),
           scale.ptr<float>(), w.shape[1], w.shape[2]);
  });
}

void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, Stream stream) {
  rowcol("quantize_rowcol", x.dtype, offsets, params, q, scale, qt, scale_t, stream, [&](auto element) {
    using T = decltype(element);
    return PlainRows<T>{x.ptr<uint4>(), x.shape[1] / wide<T>};
  });
}

void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, Stream stream) {
  rowcol("permute_quantize_rowcol", x.dtype, offsets, params, q, scale, qt, scale_t, stream, [&](auto element) {
    using T = decltype(element);
    return GatheredRows<T>{x.ptr<uint4>(), x.shape[1] / wide<T>, RowMap::of({&src, num_experts_per_tok}, x.shape[0]),
                           stream.fault};
  });
}

void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            Stream stream) {
  rowcol("swiglu_quantize_rowcol", x.dtype, offsets, params, q, scale, qt, scale_t, stream, [&](auto element) {
    using T = decltype(element);
    return ActivatedRows<T>{x.ptr<uint4>(), q.shape[1] / wide<T>, Swiglu(swiglu)};
  });
}

}  // namespace xt::cuda
