// A view of somebody else's memory: what every kernel gets instead of a framework's tensor.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "xtuner/error.h"

namespace xt {

enum class DType : uint8_t { f32, bf16, e4m3, e5m2, i32, i64, other };
enum class DeviceType : uint8_t { cpu, cuda, ascend, other };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
};

using bf16_t = uint16_t;  // the bits of a bfloat16; arithmetic happens in float

// The bits of a float8: sign, exponent and mantissa as in the name. e4m3 is the "fn" kind, without infinities.
struct e4m3_t {
  uint8_t bits;
};
struct e5m2_t {
  uint8_t bits;
};

inline int64_t size_of(DType t) {
  switch (t) {
    case DType::e4m3:
    case DType::e5m2: return 1;
    case DType::bf16: return 2;
    case DType::i64: return 8;
    default: return 4;
  }
}

struct Tensor {
  static constexpr int max_ndim = 4;

  void* data = nullptr;
  DType dtype = DType::other;
  Device device;
  int ndim = 0;
  int64_t shape[max_ndim] = {};
  int64_t strides[max_ndim] = {};  // in elements

  Tensor() = default;

  // A contiguous view of `data`.
  Tensor(const void* data, DType dtype, std::initializer_list<int64_t> dims)
      : data(const_cast<void*>(data)), dtype(dtype) {
    for (int64_t d : dims) shape[ndim++] = d;
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= shape[i];
    }
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != step) return numel() == 0;
      step *= shape[i];
    }
    return true;
  }

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace xt
