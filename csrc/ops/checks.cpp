#include "ops/checks.h"

namespace xt {

const char* name_of(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::e4m3: return "float8_e4m3fn";
    case DType::e5m2: return "float8_e5m2";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    default: return "unsupported dtype";
  }
}

static std::string name_of(Device d) {
  switch (d.type) {
    case DeviceType::cpu: return "cpu";
    case DeviceType::cuda: return "cuda:" + std::to_string(d.index);
    case DeviceType::ascend: return "npu:" + std::to_string(d.index);
    default: return "an unsupported device";
  }
}

std::string describe(const Tensor& t) {
  std::string s = std::string(name_of(t.dtype)) + " [";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  s += "] on " + name_of(t.device);
  if (!t.is_contiguous()) {
    s += ", strides (";
    for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.strides[i]);
    s += ")";
  }
  return s;
}

static std::string wanted(std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims) {
  std::string s;
  for (DType d : dtypes) s += (s.empty() ? "" : " or ") + std::string(name_of(d));
  s += " [";
  bool first = true;
  for (const Dim& d : dims) {
    s += first ? "" : ", ";
    s += d.name;
    if (d.size >= 0) s += "=" + std::to_string(d.size);
    first = false;
  }
  return s + "]";
}

void ArgChecker::tensor(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                        std::initializer_list<Dim> dims) {
  shape(name, t, dtypes, dims);
  if (!t.is_contiguous()) fail(op_, ": ", name, " must be contiguous, got ", describe(t));
  memory(name, t);
}

void ArgChecker::rows(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                      std::initializer_list<Dim> dims) {
  shape(name, t, dtypes, dims);
  const int last = t.ndim - 1;
  if (t.numel() > 0 && t.shape[last] != 1 && t.strides[last] != 1) {
    fail(op_, ": ", name, " must be contiguous in its last dim, got ", describe(t));
  }
  memory(name, t);
}

void ArgChecker::shape(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                       std::initializer_list<Dim> dims) const {
  bool ok = t.ndim == static_cast<int>(dims.size());
  int i = 0;
  for (const Dim& d : dims) {
    ok = ok && (d.size < 0 || t.shape[i] == d.size);
    ++i;
  }
  bool dtype_ok = false;
  for (DType d : dtypes) dtype_ok = dtype_ok || t.dtype == d;
  if (!ok || !dtype_ok) fail(op_, ": ", name, " must be ", wanted(dtypes, dims), ", got ", describe(t));
}

void ArgChecker::memory(const char* name, const Tensor& t) {
  if (!t.data && t.numel() > 0) fail(op_, ": ", name, " has no memory behind it (a meta or fake tensor?): ", describe(t));
  if (first_) {
    device_ = t.device;
    first_ = false;
  } else if (!(t.device == device_)) {
    fail(op_, ": ", name, " must be on ", name_of(device_), " like the arguments before it, got ", describe(t));
  }
  const uint64_t past_16 = reinterpret_cast<uintptr_t>(t.data) % 16;
  const bool floating = t.dtype != DType::i32 && t.dtype != DType::i64;
  if (t.device.type == DeviceType::cuda && floating && past_16) {
    fail(op_, ": ", name, " must start at a multiple of 16 bytes, got ", describe(t), " starting ", past_16,
         " bytes past one (a view into a larger tensor? clone() it)");
  }
}

void ArgChecker::strided(const char* name, const Tensor& t, std::initializer_list<DType> dtypes,
                         std::initializer_list<Dim> dims) {
  shape(name, t, dtypes, dims);
  memory(name, t);
}

void ArgChecker::fp8_dim(const char* name, int64_t size) const {
  require(size % 128 == 0, name, " must be a multiple of 128 for float8 (one scale covers 128 values), got ", size,
          "; use bfloat16 for this layer");
}

void ArgChecker::no_kernel() const {
#ifndef XT_CUDA
  if (device_.type == DeviceType::cuda) {
    fail(op_, ": got tensors on ", name_of(device_), ", but this build has no CUDA kernels: install xtuner again from "
         "source with XT_CUDA=ON and nvcc on PATH (pip install . -C cmake.define.XT_CUDA=ON)");
  }
#endif
  fail(op_, ": this version has no kernel for ", name_of(device_));
}

}  // namespace xt
