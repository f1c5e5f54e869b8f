// Random inputs, views and comparisons shared by the tests of the ops.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/simd/bf16.h"
#include "xtuner/build_info.h"
#include "xtuner/tensor.h"

namespace xt::test {

using Shape = std::vector<int64_t>;
using Rng = std::mt19937;
using cpu::narrow;
using cpu::widen;

inline int64_t pick(Rng& rng, const std::vector<int64_t>& from) { return from[rng() % from.size()]; }

// Sizes around the widths of vectors, register tiles and blocks.
inline const std::vector<int64_t> odd_sizes = {1, 5, 15, 16, 17, 127, 128, 129};

// float8 by definition: (1 + mantissa) 2^(exponent - bias), or mantissa 2^(1 - bias) where the exponent is 0.
inline double fp8_value(DType dtype, int code) {
  const int bits = dtype == DType::e4m3 ? 3 : 2, bias = dtype == DType::e4m3 ? 7 : 15;
  const int exponent = (code & 0x7f) >> bits, mantissa = code & ((1 << bits) - 1);
  double size = std::ldexp(exponent ? mantissa + (1 << bits) : mantissa, std::max(exponent, 1) - bias - bits);
  if (dtype == DType::e4m3 && (code & 0x7f) == 0x7f) size = std::nan("");
  if (dtype == DType::e5m2 && exponent == 31) size = mantissa ? std::nan("") : HUGE_VAL;
  return code & 0x80 ? -size : size;
}

// The code nearest to a number that is in range; of two equally near, the even one.
inline int fp8_nearest(DType dtype, double x) {
  int low = 0, high = dtype == DType::e4m3 ? 0x7e : 0x7b;
  const double size = std::fabs(x);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (fp8_value(dtype, middle) <= size ? low : high) = middle;
  }
  const double down = size - fp8_value(dtype, low), up = fp8_value(dtype, high) - size;
  return (down < up || (down == up && low % 2 == 0) ? low : high) | (std::signbit(x) ? 0x80 : 0);
}

// Owned memory, read and written as double.
class Array {
 public:
  // All bits set, which is NaN: an output that is not written, or a value that must not be read, shows up.
  Array(DType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)), bytes_(count() * size_of(dtype), 0xff) {}

  int64_t count() const {
    int64_t n = 1;
    for (int64_t d : shape_) n *= d;
    return n;
  }
  double operator[](int64_t i) const {
    if (dtype_ == DType::bf16) return widen(reinterpret_cast<const bf16_t*>(bytes_.data())[i]);
    if (size_of(dtype_) == 1) return fp8_value(dtype_, bytes_[i]);
    return reinterpret_cast<const float*>(bytes_.data())[i];
  }
  void set(int64_t i, double v) {
    if (dtype_ == DType::bf16) {
      reinterpret_cast<bf16_t*>(bytes_.data())[i] = narrow(static_cast<float>(v));
    } else if (size_of(dtype_) == 1) {
      bytes_[i] = static_cast<unsigned char>(std::isnan(v) ? 0x7f : fp8_nearest(dtype_, v));
    } else {
      reinterpret_cast<float*>(bytes_.data())[i] = static_cast<float>(v);
    }
  }
  void fill(double v) {
    for (int64_t i = 0; i < count(); ++i) set(i, v);
  }
  // Normal values in the first `n` elements (all by default); the rest keeps its NaN.
  Array& randomise(Rng& rng, int64_t n = -1) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < (n < 0 ? count() : n); ++i) set(i, normal(rng));
    return *this;
  }
  Tensor view() const {
    Tensor t;
    t.data = const_cast<unsigned char*>(bytes_.data());
    t.dtype = dtype_;
    t.ndim = static_cast<int>(shape_.size());
    int64_t step = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.shape[i] = shape_[i];
      t.strides[i] = step;
      step *= shape_[i];
    }
    return t;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  // Distance between neighbouring values near v.
  double rounding(double v) const { return std::fabs(v) * std::ldexp(1.0, dtype_ == DType::bf16 ? -8 : -23); }

 private:
  DType dtype_;
  Shape shape_;
  std::vector<unsigned char> bytes_;
};

template <class T>
Tensor view(const std::vector<T>& v, std::initializer_list<int64_t> shape) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const DType dtype = std::is_floating_point_v<T> ? DType::f32 : sizeof(T) == 4 ? DType::i32 : DType::i64;
  return Tensor(v.data(), dtype, shape);
}

// Offsets of experts with the given row counts.
inline std::vector<int64_t> offsets_of(const std::vector<int64_t>& rows) {
  std::vector<int64_t> at = {0};
  for (int64_t n : rows) at.push_back(at.back() + n);
  return at;
}

// Row counts of E experts: some empty, all empty, one hot, or spread.
inline std::vector<int64_t> random_rows(Rng& rng, int64_t num_experts) {
  std::vector<int64_t> rows(num_experts, 0);
  switch (rng() % 5) {
    case 0: break;
    case 1: rows[rng() % num_experts] = pick(rng, {127, 128, 129, 300}); break;
    default:
      for (int64_t& n : rows) n = rng() % 3 == 0 ? 0 : pick(rng, {1, 2, 5, 6, 7, 12, 15, 16, 17, 33, 129});
  }
  return rows;
}

// How a fuzz case spreads its rows over the experts.
enum class Load { empty, one_hot, random };

// Row counts of E experts that take `total` rows together (none when empty); a random load leaves some experts empty.
inline std::vector<int64_t> rows_of_load(Rng& rng, Load load, int64_t num_experts, int64_t total) {
  std::vector<int64_t> rows(num_experts, 0);
  if (load == Load::empty || num_experts == 0) return rows;
  if (load == Load::one_hot) {
    rows[rng() % num_experts] = total;
    return rows;
  }
  const int64_t groups = 1 + static_cast<int64_t>(rng() % num_experts);  // the experts that may have rows
  for (int64_t i = 0; i < total; ++i) ++rows[rng() % groups];
  std::shuffle(rows.begin(), rows.end(), rng);
  return rows;
}

// Experts of T x K choices: all dropped when empty; a random load drops some.
template <class Index>
std::vector<Index> topk_of_load(Rng& rng, Load load, int64_t t, int64_t k, int64_t num_experts) {
  std::vector<Index> idx(t * k, -1);
  if (load == Load::empty || num_experts == 0) return idx;
  const Index hot = static_cast<Index>(rng() % num_experts);
  for (Index& i : idx) {
    if (load == Load::one_hot) i = hot;
    if (load == Load::random && rng() % 8) i = static_cast<Index>(rng() % num_experts);
  }
  return idx;
}

struct FuzzCase {
  std::vector<int64_t> sizes;
  Load load;
  DType dtype;
};

// Runs body on cases in which every one of num_sizes sizes takes each value below with every load and data type.
inline void fuzz(int num_sizes, Rng& rng, const std::function<void(const FuzzCase&)>& body) {
  static const std::vector<int64_t> values = {0, 1, 2, 7, 8, 127, 128, 129, 768};
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (Load load : {Load::empty, Load::one_hot, Load::random}) {
      std::vector<std::vector<int64_t>> columns(num_sizes, values);
      for (auto& column : columns) std::shuffle(column.begin(), column.end(), rng);
      for (size_t i = 0; i < values.size(); ++i) {
        FuzzCase c{{}, load, dtype};
        std::string text = dtype == DType::bf16 ? "bf16" : "f32";
        text += load == Load::empty ? ", empty, sizes" : load == Load::one_hot ? ", one hot, sizes" : ", random, sizes";
        for (const auto& column : columns) {
          c.sizes.push_back(column[i]);
          text += " " + std::to_string(column[i]);
        }
        SCOPED_TRACE(text);
        body(c);
      }
    }
  }
}

// Runs body once per instruction set of this machine.
inline void for_each_isa(const std::function<void()>& body) {
  for (const std::string& isa : build_info().isas) {
    SCOPED_TRACE("isa " + isa);
    force_isa(isa);
    body();
  }
  force_isa("");
}

// run(num_threads, out) must give the same bits for every thread count.
inline void expect_same_bits(const Array& start, const std::function<void(int, Array&)>& run) {
  Array one = start;
  run(1, one);
  for (int threads : {2, 3, 8}) {
    Array many = start;
    run(threads, many);
    EXPECT_EQ(one.bytes(), many.bytes()) << threads << " threads";
  }
}

// body must throw xt::Error whose message contains `part`.
inline void expect_error(const std::function<void()>& body, const std::string& part) {
  try {
    body();
    ADD_FAILURE() << "no error; expected: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << "expected: " << part << "\n     got: " << e.what();
  }
}

}  // namespace xt::test
