// torch tensors as xt::Tensor views, without torch headers and without copies.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "xtuner/dlpack_abi.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt::python {

namespace py = pybind11;

// How tensors are read; set once by init_exchange.
struct Exchange {
  py::handle tensor_type;                        // torch.Tensor, kept alive for ever
  const dlpack::ExchangeTable* table = nullptr;  // null: go through __dlpack__() capsules
};

inline Exchange& exchange() {
  static Exchange e;
  return e;
}

// `tensor_type` is torch.Tensor. A torch without the DLPack exchange table (or use_table false) is served by capsules.
inline void init_exchange(py::object tensor_type, bool use_table) {
  Exchange e;
  if (use_table && py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) {
    py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!table) throw py::error_already_set();
    e.table = static_cast<const dlpack::ExchangeTable*>(table);
    if (e.table->header.version.major != 1 || !e.table->view_from_object) e.table = nullptr;
  }
  e.tensor_type = tensor_type.release();
  exchange() = e;
}

inline DType dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return DType::other;
  if (t.code == dlpack::type_float && t.bits == 32) return DType::f32;
  if (t.code == dlpack::type_bfloat && t.bits == 16) return DType::bf16;
  if (t.code == dlpack::type_e4m3fn && t.bits == 8) return DType::e4m3;
  if (t.code == dlpack::type_e5m2 && t.bits == 8) return DType::e5m2;
  if (t.code == dlpack::type_int && t.bits == 32) return DType::i32;
  if (t.code == dlpack::type_int && t.bits == 64) return DType::i64;
  return DType::other;
}

inline Device device_of(dlpack::Device d) {
  switch (d.code) {
    case dlpack::device_cpu: return {DeviceType::cpu, 0};
    case dlpack::device_cuda: return {DeviceType::cuda, d.id};
    case dlpack::device_ext: return {DeviceType::ascend, d.id};
    default: return {DeviceType::other, d.id};
  }
}

inline Tensor tensor_of(const dlpack::View& v, const char* op, const char* name) {
  if (v.ndim > Tensor::max_ndim) fail(op, ": ", name, " must have at most ", Tensor::max_ndim, " dims, got ", v.ndim);
  Tensor t;
  t.data = v.data ? static_cast<char*>(v.data) + v.byte_offset : nullptr;
  t.dtype = dtype_of(v.dtype);
  t.device = device_of(v.device);
  t.ndim = v.ndim;
  int64_t step = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    t.shape[i] = v.shape[i];
    t.strides[i] = v.strides ? v.strides[i] : step;
    step *= v.shape[i];
  }
  return t;
}

// One tensor argument. Holds what keeps the view alive; must outlive the kernel call and die with the GIL held.
class Arg {
 public:
  Arg(const char* op, const char* name, py::handle value) {
    const Exchange& e = exchange();
    if (!e.tensor_type) fail("call _C.init_exchange(torch.Tensor) before any kernel");
    const int is_tensor = PyObject_IsInstance(value.ptr(), e.tensor_type.ptr());
    if (is_tensor < 0) throw py::error_already_set();
    if (!is_tensor) fail(op, ": ", name, " must be a torch.Tensor, got ", Py_TYPE(value.ptr())->tp_name);
    if (e.table) {
      dlpack::View view;
      if (e.table->view_from_object(value.ptr(), &view) != 0) throw py::error_already_set();
      tensor_ = tensor_of(view, op, name);
      stream_ = stream_of(*e.table, view.device);
    } else {
      owner_ = value.attr("detach")().attr("__dlpack__")();
      void* managed = PyCapsule_GetPointer(owner_.ptr(), "dltensor");
      if (!managed) throw py::error_already_set();
      tensor_ = tensor_of(static_cast<dlpack::Managed*>(managed)->view, op, name);
    }
  }

  const Tensor& operator*() const { return tensor_; }
  void* stream() const { return stream_; }

 private:
  static void* stream_of(const dlpack::ExchangeTable& table, dlpack::Device device) {
    void* stream = nullptr;
    if (device.code != dlpack::device_cpu && table.current_stream &&
        table.current_stream(device.code, device.id, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }

  Tensor tensor_;
  void* stream_ = nullptr;
  py::object owner_;  // the capsule, on the slow path
};

// An argument that may be None.
class OptionalArg {
 public:
  OptionalArg(const char* op, const char* name, py::handle value) {
    if (!value.is_none()) arg_.emplace(op, name, value);
  }
  const Tensor* get() const { return arg_ ? &**arg_ : nullptr; }

 private:
  std::optional<Arg> arg_;
};

// Where the kernels of each GPU note faults: by device index, null where nobody watches.
inline std::vector<uint64_t*>& fault_words() {
  static std::vector<uint64_t*> words;
  return words;
}

// From now on the kernels of the word's device note faults in it; the caller keeps the tensor alive for ever.
inline void watch_faults(py::handle word) {
  const Arg arg("watch_faults", "word", word);
  const Tensor& t = *arg;
  if (t.dtype != DType::i64 || t.numel() != 1 || t.device.type != DeviceType::cuda) {
    fail("watch_faults: word must be one int64 on a GPU");
  }
  auto& words = fault_words();
  const auto index = static_cast<size_t>(t.device.index);
  if (words.size() <= index) words.resize(index + 1);
  words[index] = t.ptr<uint64_t>();
}

// The stream of the first argument's device, where that device's kernels note faults, and the CPU threads a kernel may use.
inline Stream stream_of(const Arg& first, int num_threads) {
  const Device device = (*first).device;
  const auto index = static_cast<size_t>(device.index);
  const bool watched = device.type == DeviceType::cuda && index < fault_words().size();
  return {first.stream(), num_threads, watched ? fault_words()[index] : nullptr};
}

}  // namespace xt::python
