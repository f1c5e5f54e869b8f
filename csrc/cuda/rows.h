// Rows as sequences of memory accesses: 16 bytes each where the row's length allows, else one element; and their
// distribution over warps.
#pragma once
#include <cuda_bf16.h>

#include "cuda/launch.h"

namespace xt::cuda {

// N neighbouring elements that one access moves, and their values in fp32. bfloat16 is rounded to nearest, ties to
// even; a NaN becomes 0x7fff.
template <class T, int N>
struct Access;

template <>
struct Access<float, 1> {
  using Bits = uint32_t;
  static __device__ void widen(Bits b, float* f) { f[0] = __uint_as_float(b); }
  static __device__ Bits narrow(const float* f) { return __float_as_uint(f[0]); }
};

template <>
struct Access<float, 4> {
  using Bits = uint4;
  static __device__ void widen(Bits b, float* f) {
    f[0] = __uint_as_float(b.x);
    f[1] = __uint_as_float(b.y);
    f[2] = __uint_as_float(b.z);
    f[3] = __uint_as_float(b.w);
  }
  static __device__ Bits narrow(const float* f) {
    return {__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3])};
  }
};

template <>
struct Access<bf16_t, 1> {
  using Bits = uint16_t;
  static __device__ void widen(Bits b, float* f) { f[0] = __uint_as_float(static_cast<uint32_t>(b) << 16); }
  static __device__ Bits narrow(const float* f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f[0])); }
};

template <>
struct Access<bf16_t, 8> {
  using Bits = uint4;
  static __device__ void widen_pair(uint32_t b, float* f) {
    f[0] = __uint_as_float(b << 16);
    f[1] = __uint_as_float(b & 0xffff0000u);
  }
  static __device__ uint32_t narrow_pair(const float* f) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(f[0], f[1]);  // one instruction for both
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
  }
  static __device__ void widen(Bits b, float* f) {
    widen_pair(b.x, f);
    widen_pair(b.y, f + 2);
    widen_pair(b.z, f + 4);
    widen_pair(b.w, f + 6);
  }
  static __device__ Bits narrow(const float* f) {
    return {narrow_pair(f), narrow_pair(f + 2), narrow_pair(f + 4), narrow_pair(f + 6)};
  }
};

// Calls body(T{}, integral constant N) with the element type of `dtype` and the widest access that divides `width`
// elements.
template <class Body>
void with_access(DType dtype, int64_t width, const Body& body) {
  if (dtype == DType::f32) {
    width % 4 ? body(float{}, std::integral_constant<int, 1>{}) : body(float{}, std::integral_constant<int, 4>{});
  } else {
    width % 8 ? body(bf16_t{}, std::integral_constant<int, 1>{}) : body(bf16_t{}, std::integral_constant<int, 8>{});
  }
}

// Rows of `units` accesses, cut into tiles of 32 lanes x `per_lane` accesses: one warp takes one tile at a time.
// Access j of a lane is unit `begin + j * 32` of the row: neighbouring lanes read neighbouring memory.
template <int per_lane>
struct RowTiles {
  int64_t rows, units, per_row;

  RowTiles(int64_t rows, int64_t units)
      : rows(rows), units(units), per_row((units + per_lane * warp_size - 1) / (per_lane * warp_size)) {}

  __host__ __device__ int64_t count() const { return rows * per_row; }

  struct Tile {
    int64_t row, begin;  // begin: of this lane
  };
  // Units from the lane's first to the end of the row, cut to the tile: access j exists if j * 32 is less.
  __device__ int left(const Tile& t) const {
    return static_cast<int>(min(units - t.begin, int64_t{per_lane * warp_size}));
  }
  __device__ Tile at(int64_t index) const {
    // 64-bit division is slow and hardly ever needed.
    const int64_t row = index >> 32 || per_row >> 32
                            ? index / per_row
                            : static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row);
    return {row, (index - row * per_row) * (per_lane * warp_size) + lane()};
  }
};

// offsets[E] as a number of rows; all rows where there are no offsets.
struct UsedRows {
  const int64_t* end;  // of offsets, or null
  int64_t rows;

  UsedRows(const Tensor* offsets, int64_t rows)
      : end(offsets ? offsets->ptr<int64_t>() + offsets->shape[0] - 1 : nullptr), rows(rows) {}

  __device__ int64_t get(uint64_t* fault) const {
    if (!end) return rows;
    const int64_t used = *end;
    if (used >= 0 && used <= rows) return used;
    note(fault, Fault::offsets, used);
    return used < 0 ? 0 : rows;
  }
};

}  // namespace xt::cuda
