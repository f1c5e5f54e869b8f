// The part of the DLPack 1.2 C ABI that we exchange tensors through (https://dmlc.github.io/dlpack/latest/c_api.html):
// the plain view, its two owning wrappers, and the table of functions that a tensor class publishes in its attribute
// `__dlpack_c_exchange_api__`. Struct layouts are fixed by that specification; names are ours.
#pragma once
#include <cstddef>
#include <cstdint>

namespace xt::dlpack {

enum DeviceCode : int32_t { device_cpu = 1, device_cuda = 2, device_ext = 12 };
enum TypeCode : uint8_t { type_int = 0, type_float = 2, type_bfloat = 4, type_e4m3fn = 10, type_e5m2 = 12 };

struct Device {
  int32_t code;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct View {  // DLTensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Managed {  // DLManagedTensor, in capsules named "dltensor"
  View view;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {  // DLManagedTensorVersioned
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  View view;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct ExchangeTable {  // DLPackExchangeAPI; functions return 0, or -1 with a Python exception set
  ExchangeHeader header;
  int (*allocate)(View* prototype, ManagedVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedVersioned** out);
  int (*object_from_managed)(ManagedVersioned* tensor, void** out);
  int (*view_from_object)(void* object, View* out);  // may be null
  int (*current_stream)(int32_t device_code, int32_t device_id, void** out);
};

static_assert(sizeof(void*) != 8 || (sizeof(View) == 48 && offsetof(View, shape) == 24 && offsetof(View, byte_offset) == 40),
              "View differs from the DLPack ABI");
static_assert(sizeof(void*) != 8 || (offsetof(ManagedVersioned, view) == 32 && offsetof(ExchangeTable, allocate) == 16),
              "owning structs differ from the DLPack ABI");

}  // namespace xt::dlpack
