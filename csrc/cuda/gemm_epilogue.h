// From the tensor cores' sums to the output. A warp holds strips of 16 rows by blocks of 8 columns as mma leaves them:
// with g = lane/4 and q = lane%4, sums[j] of a lane are columns 2q and 2q+1 of row g, then the same of row g+8.
#pragma once
#include "cuda/gemm.h"
#include "cuda/rows.h"

namespace xt::cuda {

// Of 4 lanes with consecutive q each passes 4 words of row g, one per block: lane q gets block q whole, 16 bytes.
__device__ __forceinline__ uint4 transpose_quad(uint32_t (&v)[4]) {
  const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(all_lanes, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(all_lanes, high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = got;
  }
  return {v[0], v[1], v[2], v[3]};
}

// Where the columns of a tile are in the output. A tile of b paired for SwiGLU holds as many columns of gate as of up.
struct TileColumns {
  int first, end;   // of the tile, or of its half of gate; end of the output's columns, or of gate's
  int half;         // columns from gate to up
  int pair_blocks;  // blocks of gate; 0: not paired

  // First column of the tile's block j; -1 outside of the output.
  __device__ int at(int j) const {
    const bool up = pair_blocks && j >= pair_blocks;
    const int column = first + 8 * (up ? j - pair_blocks : j);
    return column < end ? column + (up ? half : 0) : -1;
  }
};

__device__ inline TileColumns tile_columns(const Epilogue& e, int64_t n_block, int block_n) {
  const int n = static_cast<int>(e.num_n), block = static_cast<int>(n_block);
  if (!e.act) return {block * block_n, n, 0, 0};
  return {block * (block_n / 2), n / 2, n / 2, block_n / 16};
}

// Neighbouring values of the output's dtype: a lane's two of a block.
template <bool f32>
struct Pair;
template <>
struct Pair<true> {
  static __device__ __forceinline__ void add(const void* from, int64_t at, float (&v)[2]) {
    const uint2 pair = *reinterpret_cast<const uint2*>(static_cast<const float*>(from) + at);
    v[0] += __uint_as_float(pair.x);
    v[1] += __uint_as_float(pair.y);
  }
  static __device__ __forceinline__ void round(float (&)[2]) {}
};
template <>
struct Pair<false> {
  static __device__ __forceinline__ void add(const void* from, int64_t at, float (&v)[2]) {
    float f[2];
    Access<bf16_t, 8>::widen_pair(*reinterpret_cast<const uint32_t*>(static_cast<const bf16_t*>(from) + at), f);
    v[0] += f[0];
    v[1] += f[1];
  }
  static __device__ __forceinline__ void round(float (&v)[2]) {
    const uint32_t rounded = Access<bf16_t, 8>::narrow_pair(v);
    Access<bf16_t, 8>::widen_pair(rounded, v);
  }
};

// Two values per lane in each of 4 blocks, to a row of `to` (null: nowhere), in full 32-byte sectors.
template <bool f32>
__device__ __forceinline__ void store_4_blocks(void* to, const int (&columns)[4], const float (&v)[4][2]) {
  const int q = lane() % 4;
  if constexpr (f32) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint2 pair = {__float_as_uint(v[j][0]), __float_as_uint(v[j][1])};
      if (to && columns[j] >= 0) *reinterpret_cast<uint2*>(static_cast<float*>(to) + columns[j] + 2 * q) = pair;
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = Access<bf16_t, 8>::narrow_pair(v[j]);
    const uint4 block = transpose_quad(words);
    const int column = q < 2 ? (q == 0 ? columns[0] : columns[1]) : (q == 2 ? columns[2] : columns[3]);
    if (to && column >= 0) *reinterpret_cast<uint4*>(static_cast<bf16_t*>(to) + column) = block;
  }
}

// Row r of `to`; null where there is no such row.
template <bool f32>
__device__ __forceinline__ void* row_of(void* to, int64_t r, int64_t row_length, bool exists) {
  return exists ? static_cast<char*>(to) + r * row_length * (f32 ? 4 : 2) : nullptr;
}

template <bool f32, int blocks, class BlockOf>
__device__ __forceinline__ void store_strip_as(const Epilogue& e, const float (&sums)[blocks][4], int64_t expert,
                                               int64_t row, int64_t rows_end, const TileColumns& tile,
                                               const BlockOf& block_of) {
  static_assert(blocks % 8 == 0);
  const int q2 = 2 * (lane() % 4);
#pragma unroll
  for (int j0 = 0; j0 < blocks / 2; j0 += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + lane() / 4 + 8 * half;
      void* const out = row_of<f32>(e.out, r, e.num_n, r < rows_end);
      float v[2][4][2];
      int columns[2][4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int block = side * (blocks / 2) + j0 + j, column = tile.at(block_of(block));
          columns[side][j] = column;
          v[side][j][0] = sums[block][2 * half];
          v[side][j][1] = sums[block][2 * half + 1];
          if (e.bias && column >= 0) Pair<f32>::add(e.bias, expert * e.num_n + column + q2, v[side][j]);
          if (e.accumulate && column >= 0 && out) Pair<f32>::add(out, column + q2, v[side][j]);
        }
        if (e.accumulate) __syncwarp();  // what this lane writes, others have read
        store_4_blocks<f32>(out, columns[side], v[side]);
      }
      if (!e.act) continue;
      float act[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Pair<f32>::round(v[0][j]);
        Pair<f32>::round(v[1][j]);
        act[j][0] = e.swiglu.forward(v[0][j][0], v[1][j][0]);
        act[j][1] = e.swiglu.forward(v[0][j][1], v[1][j][1]);
      }
      store_4_blocks<f32>(row_of<f32>(e.act, r, e.num_n / 2, r < rows_end), columns[0], act);
    }
  }
}

// One strip whose first row is `row`; rows from rows_end on belong to somebody else. block_of(j) is the tile's block
// that sums[j] holds; paired, the strip's first half of blocks is gate and its second half the same columns of up.
template <int blocks, class BlockOf>
__device__ __forceinline__ void store_strip(const Epilogue& e, const float (&sums)[blocks][4], int64_t expert,
                                            int64_t row, int64_t rows_end, const TileColumns& tile,
                                            const BlockOf& block_of) {
  if (e.out_f32) {
    store_strip_as<true>(e, sums, expert, row, rows_end, tile, block_of);
  } else {
    store_strip_as<false>(e, sums, expert, row, rows_end, tile, block_of);
  }
}

// The same where the sums are the gradient of swiglu(gate_up), in bfloat16; `tile` has the columns of gate_up, of which
// the sums are those of gate. Rows of gate_up come as results go, 16 bytes per lane.
template <int blocks, class BlockOf>
__device__ __forceinline__ void store_dswiglu(const Epilogue& e, const float (&sums)[blocks][4], int64_t row,
                                              int64_t rows_end, const TileColumns& tile, int64_t part,
                                              const BlockOf& block_of) {
  constexpr int quads = blocks / 4;
  const int q = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + lane() / 4 + 8 * half;
    const bool exists = r < rows_end;
    const bf16_t* const x = static_cast<const bf16_t*>(e.gate_up) + r * e.num_n;
    uint4 gate[quads] = {}, up[quads] = {};
#pragma unroll
    for (int i = 0; i < quads; ++i) {
      const int column = tile.at(block_of(4 * i + q));
      if (!exists || column < 0) continue;
      gate[i] = __ldg(reinterpret_cast<const uint4*>(x + column));
      up[i] = __ldg(reinterpret_cast<const uint4*>(x + column + tile.half));
    }
    void *const out = row_of<false>(e.out, r, e.num_n, exists), *const act = row_of<false>(e.act, r, e.num_n / 2, exists);
    const float weight = exists && e.weights ? __ldg(e.weights + r) : 1.0f;
    float dot = 0;
#pragma unroll
    for (int i = 0; i < quads; ++i) {
      uint32_t gates[4] = {gate[i].x, gate[i].y, gate[i].z, gate[i].w}, ups[4] = {up[i].x, up[i].y, up[i].z, up[i].w};
      transpose_quad(gates);
      transpose_quad(ups);
      float dg[4][2], du[4][2], a[4][2];
      int columns[4], up_columns[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        columns[j] = tile.at(block_of(4 * i + j));
        up_columns[j] = columns[j] < 0 ? -1 : columns[j] + tile.half;
        float g[2], u[2], d[2] = {sums[4 * i + j][2 * half], sums[4 * i + j][2 * half + 1]};
        Pair<false>::round(d);
        Access<bf16_t, 8>::widen_pair(gates[j], g);
        Access<bf16_t, 8>::widen_pair(ups[j], u);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          e.swiglu.backward(weight * d[n], g[n], u[n], dg[j][n], du[j][n], a[j][n]);
          dot = fmaf(d[n], a[j][n], dot);
          a[j][n] *= weight;
        }
      }
      store_4_blocks<false>(out, columns, dg);
      store_4_blocks<false>(out, up_columns, du);
      store_4_blocks<false>(act, columns, a);
    }
    if (!e.weights) continue;
    dot += __shfl_xor_sync(all_lanes, dot, 1);
    dot += __shfl_xor_sync(all_lanes, dot, 2);
    if (q == 0 && exists && tile.at(block_of(0)) >= 0) e.dots[r * e.dot_parts + part] = dot;
  }
}

// A tile that is nothing but zeros, of rows [row, rows_end), by `threads` threads of which this is number `thread`.
// Columns as for the tile's blocks, whose number is `blocks`.
__device__ inline void zero_tile(const Epilogue& e, int64_t row, int64_t rows_end, const TileColumns& tile, int blocks,
                                    int thread, int threads) {
  const int64_t units = (rows_end - row) * blocks;  // of 8 columns
  for (int64_t i = thread; i < units; i += threads) {
    const int j = static_cast<int>(i % blocks);
    const int column = tile.at(j);
    const int64_t r = row + i / blocks;
    if (column < 0) continue;
    const auto zero = [&](void* to, int64_t at) {
      uint4* p = reinterpret_cast<uint4*>(static_cast<char*>(to) + at * (e.out_f32 ? 4 : 2));
      p[0] = {};
      if (e.out_f32) p[1] = {};
    };
    zero(e.out, r * e.num_n + column);
    if (e.act && j < tile.pair_blocks) zero(e.act, r * (e.num_n / 2) + column);
  }
}

}  // namespace xt::cuda
