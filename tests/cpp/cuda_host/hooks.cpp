// How the machine learns of a kernel's memory accesses: the .cu sources are compiled with -fsanitize=thread, which
// calls __tsan_* before each access, and with parts of -fsanitize=undefined, but linked without the sanitizers'
// libraries; these are our own definitions of the calls that the compiler emits.
#include "machine.h"

using cuda_host::plain_access;

#define XT_HOOKS(n)                                                                \
  void __tsan_read##n(void* p) { plain_access(p, n, false, false); }               \
  void __tsan_write##n(void* p) { plain_access(p, n, true, false); }               \
  void __tsan_unaligned_read##n(void* p) { plain_access(p, n, false, n > 1); }     \
  void __tsan_unaligned_write##n(void* p) { plain_access(p, n, true, n > 1); }

namespace {

struct Location {  // the head of every record that the undefined-behaviour checks pass
  const char* file;
  uint32_t line, column;
};

void report(const char* what, const void* record) {
  const auto* at = static_cast<const Location*>(record);
  cuda_host::undefined_behaviour(std::string(what) + " at " + at->file + ":" + std::to_string(at->line));
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
XT_HOOKS(1)
XT_HOOKS(2)
XT_HOOKS(4)
XT_HOOKS(8)
XT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { plain_access(p, bytes, false, false); }
void __tsan_write_range(void* p, size_t bytes) { plain_access(p, bytes, true, false); }

uint32_t __tsan_atomic32_load(const uint32_t* p, int) {
  cuda_host::atomic_access(p, sizeof *p);
  return *p;
}
void __tsan_atomic32_store(uint32_t* p, uint32_t v, int) {
  cuda_host::atomic_access(p, sizeof *p);
  *p = v;
}

void __ubsan_handle_out_of_bounds(void* record, uintptr_t) { report("index out of bounds", record); }
void __ubsan_handle_add_overflow(void* record, uintptr_t, uintptr_t) { report("overflow of +", record); }
void __ubsan_handle_sub_overflow(void* record, uintptr_t, uintptr_t) { report("overflow of -", record); }
void __ubsan_handle_mul_overflow(void* record, uintptr_t, uintptr_t) { report("overflow of *", record); }
void __ubsan_handle_negate_overflow(void* record, uintptr_t) { report("overflow of unary -", record); }
void __ubsan_handle_divrem_overflow(void* record, uintptr_t, uintptr_t) { report("division by zero", record); }
void __ubsan_handle_shift_out_of_bounds(void* record, uintptr_t, uintptr_t) { report("bad shift", record); }

}  // extern "C"
