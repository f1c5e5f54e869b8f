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

// to[j * to_row + i] = from[i * from_row + j] for i, j < 16. Interleaving row i with row i + 8 four times over moves
// every bit of the row number into the column number and back.
static XT_INLINE void transpose_bytes16(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row) {
  Bytes16 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&a[i], from + i * from_row, 16);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = interleave_low(a[i], a[i + 8]);
      b[2 * i + 1] = interleave_high(a[i], a[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * to_row, &a[i], 16);
}

}  // namespace xt::cpu
