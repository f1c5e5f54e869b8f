// Transposes blocks of 16 x 16 bytes in registers.
#pragma once
#include <cstdint>

#include "cpu/simd/inline.h"

namespace xt::cpu {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// Bytes alternately from the low (or the high) halves of a and b.
static XT_INLINE Bytes16 interleave_low(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static XT_INLINE Bytes16 interleave_high(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

static XT_INLINE void interleave(Bytes16 a, Bytes16 b, Bytes16* to) {
  to[0] = interleave_low(a, b);
  to[1] = interleave_high(a, b);
}
template <class Vec>
XT_INLINE void interleave(Vec a, Vec b, Vec* to) {
  to[0] = Vec::interleave_low(a, b);
  to[1] = Vec::interleave_high(a, b);
}

// Transposes the 16 x 16 bytes of 16 vectors, or of each 16 bytes of wider ones. Interleaving row i with row i + 8 four
// times over moves every bit of the row number into the column number and back.
template <class Bytes>
XT_INLINE void transpose16(Bytes* a) {
  Bytes b[16];
#pragma GCC unroll 2
  for (int twice = 0; twice < 2; ++twice) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) interleave(a[i], a[i + 8], b + 2 * i);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) interleave(b[i], b[i + 8], a + 2 * i);
  }
}

// to[j * to_row + i] = from[i * from_row + j] for i, j < 16.
static XT_INLINE void transpose_bytes16(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row) {
  Bytes16 a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&a[i], from + i * from_row, 16);
  transpose16(a);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * to_row, &a[i], 16);
}

}  // namespace xt::cpu
