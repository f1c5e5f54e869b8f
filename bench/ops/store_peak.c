/* Fills memory from a register: the ceiling of whatever writes more than it reads. */
#include <immintrin.h>

void store_plain(char* to, long bytes) {
  const __m256i x = _mm256_set1_epi8(1);
  for (long i = 0; i + 64 <= bytes; i += 64) {
    _mm256_store_si256((__m256i*)(to + i), x);
    _mm256_store_si256((__m256i*)(to + i + 32), x);
    __asm__ volatile("" ::: "memory"); /* else a call of memset, which streams as it pleases */
  }
}

void store_stream(char* to, long bytes) {
  const __m256i x = _mm256_set1_epi8(1);
  for (long i = 0; i + 64 <= bytes; i += 64) {
    _mm256_stream_si256((__m256i*)(to + i), x);
    _mm256_stream_si256((__m256i*)(to + i + 32), x);
  }
  _mm_sfence();
}
