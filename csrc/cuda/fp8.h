// float8 codes, and the scales of their blocks of 128 values. GPUs before 8.9, and the tests' host, have no instruction
// for the conversions; what they run instead gives the same codes for the same numbers.
#pragma once
#include "cuda/rows.h"
#include "xtuner/ops/quantize.h"

namespace xt::cuda {

constexpr int fp8_block = 128;
constexpr uint32_t fp8_nans = 0x7f7f7f7f;  // a NaN in both formats, four times

template <class F>
struct Fp8;
template <>
struct Fp8<e4m3_t> {
  static constexpr int mantissa = 3, bias = 7;
  static constexpr float largest = 448.0f;
  static constexpr uint32_t special = 0x7f;  // first code that is no number, and the first NaN among those
  static constexpr uint32_t nan = 0x7f;
};
template <>
struct Fp8<e5m2_t> {
  static constexpr int mantissa = 2, bias = 15;
  static constexpr float largest = 57344.0f;
  static constexpr uint32_t special = 0x7c;
  static constexpr uint32_t nan = 0x7d;
};

// Shifted by `shift`, a code's exponent and mantissa stand where a float has them; the exponent is then `rebias` short.
template <class F>
struct Fp8Bits {
  static constexpr int shift = 23 - Fp8<F>::mantissa;
  static constexpr uint32_t rebias = (127u - Fp8<F>::bias) << 23;
  static constexpr uint32_t smallest_normal = rebias + (1u << 23);
  // Added to a positive float below the smallest normal number, it leaves in the sum's low bits how often the smallest
  // subnormal number goes into that float, rounded.
  static constexpr uint32_t rounder = rebias + ((shift + 1u) << 23);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890

__device__ inline uint32_t encode_pair(e4m3_t, float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
__device__ inline uint32_t encode_pair(e5m2_t, float low, float high) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
__device__ inline void decode_pair(e4m3_t, uint16_t codes, float* f) {
  asm("{.reg .b32 p; .reg .b16 l, h; cvt.rn.f16x2.e4m3x2 p, %2; mov.b32 {l, h}, p; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(f[0]), "=f"(f[1])
      : "h"(codes));
}
__device__ inline void decode_pair(e5m2_t, uint16_t codes, float* f) {
  asm("{.reg .b32 p; .reg .b16 l, h; cvt.rn.f16x2.e5m2x2 p, %2; mov.b32 {l, h}, p; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(f[0]), "=f"(f[1])
      : "h"(codes));
}

#else

template <class F>
__device__ uint32_t encode(float x) {
  using B = Fp8Bits<F>;
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu, odd = size >> B::shift & 1u;
  const uint32_t normal = (size + ((1u << (B::shift - 1)) - 1u) + odd - B::rebias) >> B::shift;
  const uint32_t subnormal = __float_as_uint(__uint_as_float(size) + __uint_as_float(B::rounder)) - B::rounder;
  // A NaN gives some code of its own, and leaves its neighbours alone.
  return ((size < B::smallest_normal ? subnormal : normal) & 0x7fu) | (bits >> 24 & 0x80u);
}
template <class F>
__device__ float decode(uint32_t code) {
  using B = Fp8Bits<F>;
  const uint32_t size = code & 0x7fu;
  // A subnormal number is read as if its exponent were 1 and it had the leading one that it lacks, then loses that one.
  const bool subnormal = size < 1u << Fp8<F>::mantissa;
  const uint32_t shifted = (size << B::shift) + B::rebias + (subnormal ? 1u << 23 : 0u);
  uint32_t bits = __float_as_uint(__uint_as_float(shifted) - __uint_as_float(subnormal ? B::smallest_normal : 0u));
  if (size >= Fp8<F>::special) bits |= 0x7f800000u;
  if (size >= Fp8<F>::nan) bits |= 0x400000u;
  return __uint_as_float(bits | (code & 0x80u) << 24);
}
template <class F>
__device__ uint32_t encode_pair(F, float low, float high) {
  return encode<F>(low) | encode<F>(high) << 8;
}
template <class F>
__device__ void decode_pair(F, uint16_t codes, float* f) {
  f[0] = decode<F>(codes & 0xffu);
  f[1] = decode<F>(codes >> 8);
}

#endif

// The codes of N values, in N/4 words. Numbers must be in range; what NaNs give is not the same everywhere.
template <int N>
struct Codes;
template <>
struct Codes<4> {
  using Bits = uint32_t;
  static __device__ Bits of(const uint32_t* words) { return words[0]; }
  static __device__ void words(Bits b, uint32_t* words) { words[0] = b; }
};
template <>
struct Codes<8> {
  using Bits = uint2;
  static __device__ Bits of(const uint32_t* words) { return {words[0], words[1]}; }
  static __device__ void words(Bits b, uint32_t* words) {
    words[0] = b.x;
    words[1] = b.y;
  }
};

template <class F>
__device__ uint32_t encode_word(const float* f) {
  return encode_pair(F{}, f[0], f[1]) | encode_pair(F{}, f[2], f[3]) << 16;
}
template <class F>
__device__ void decode_word(uint32_t word, float* f) {
  decode_pair(F{}, static_cast<uint16_t>(word), f);
  decode_pair(F{}, static_cast<uint16_t>(word >> 16), f + 2);
}

__device__ inline bool is_finite(float scale) { return scale < __uint_as_float(0x7f800000u); }

// The codes of N values that share a scale.
template <class F, int N>
__device__ typename Codes<N>::Bits quantize(const float* v, float scale) {
  const float inverse = 1.0f / scale;
  uint32_t words[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float scaled[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) scaled[n] = v[4 * i + n] * inverse;
    words[i] = is_finite(scale) ? encode_word<F>(scaled) : fp8_nans;
  }
  return Codes<N>::of(words);
}

struct ScaleRule {
  float eps;
  bool power_of_two;

  explicit ScaleRule(QuantizeParams p) : eps(static_cast<float>(p.eps)), power_of_two(p.power_of_two) {}

  // `largest`: the bits of the block's largest |x|.
  template <class F>
  __device__ float scale(uint32_t largest) const {
    const float maximum = __uint_as_float(largest);
    const float scale = (maximum < eps ? eps : maximum) / Fp8<F>::largest;
    if (!power_of_two || !is_finite(scale)) return scale;
    return __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);  // up to the next power of two
  }
};

// Absolute values as integers: these are ordered as the numbers are, and NaN stands above infinity, so that it survives
// a maximum.
__device__ inline uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// The largest over `lanes` neighbouring lanes, a power of two.
template <int lanes>
__device__ uint32_t largest_of_lanes(uint32_t m) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) m = max(m, __shfl_xor_sync(all_lanes, m, step));
  return m;
}

// Calls body(T{}, F{}) with the types of `data` and of `codes`.
template <class Body>
void with_formats(DType data, DType codes, const Body& body) {
  if (data == DType::f32) {
    codes == DType::e4m3 ? body(float{}, e4m3_t{}) : body(float{}, e5m2_t{});
  } else {
    codes == DType::e4m3 ? body(bf16_t{}, e4m3_t{}) : body(bf16_t{}, e5m2_t{});
  }
}

// Elements of T in 16 bytes.
template <class T>
constexpr int wide = 16 / sizeof(T);

}  // namespace xt::cuda
