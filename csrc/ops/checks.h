// Argument checks shared by all ops. Messages say: op, argument, what it must be, what it is.
#pragma once
#include <initializer_list>
#include <string>

#include "xtuner/tensor.h"

namespace xt {

struct Dim {
  const char* name;
  int64_t size = -1;  // -1: any
};

std::string describe(const Tensor& t);  // "float32 [3, 4] on cpu"
const char* name_of(DType t);

// One call's arguments; the first tensor checked fixes the device of the rest.
class ArgChecker {
 public:
  explicit ArgChecker(const char* op) : op_(op) {}

  // `t` has one of these dtypes and this shape, is contiguous, on the device of the first argument and, on a GPU, starts
  // at a multiple of 16 bytes unless it holds integers.
  void tensor(const char* name, const Tensor& t, std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims);
  // The same, but only the last dim must be contiguous.
  void rows(const char* name, const Tensor& t, std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims);

  // A map of rows, if there is one: `src` of `rows` rows and a positive number of choices per token.
  void gather(const Tensor* src, int64_t num_experts_per_tok, int64_t rows = -1) {
    if (!src) return;
    tensor("src", *src, {DType::i32}, {{"R", rows}});
    require(num_experts_per_tok > 0 && num_experts_per_tok <= INT32_MAX, "num_experts_per_tok must be positive, got ",
            num_experts_per_tok);
  }
  // The same with any strides.
  void strided(const char* name, const Tensor& t, std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims);
  // A feature dim of a float8 operand is whole blocks of 128.
  void fp8_dim(const char* name, int64_t size) const;

  // A condition on values rather than on tensors.
  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (!ok) fail(op_, ": ", parts...);
  }

  // The device is one that has kernels in this build.
  [[noreturn]] void no_kernel() const;
  Device device() const { return device_; }

 private:
  void shape(const char* name, const Tensor& t, std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims) const;
  void memory(const char* name, const Tensor& t);

  const char* op_;
  bool first_ = true;
  Device device_;
};

constexpr std::initializer_list<DType> data_dtypes = {DType::f32, DType::bf16};
constexpr std::initializer_list<DType> fp8_dtypes = {DType::e4m3, DType::e5m2};

}  // namespace xt
