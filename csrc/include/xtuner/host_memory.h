#pragma once

namespace xt {

// Makes the C library keep large blocks of freed host memory for later allocations instead of returning each of them to
// the system, which must hand it out again zeroed and page by page: a training step frees and allocates the same
// gigabytes every time. The process then stays as large as it once was. Returns false where the C library is not glibc.
// Call it once, early; it affects the whole process.
bool keep_freed_memory();

}  // namespace xt
