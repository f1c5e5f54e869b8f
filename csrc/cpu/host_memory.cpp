#include "xtuner/host_memory.h"

#include <climits>
#include <cstdlib>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace xt {

bool keep_freed_memory() {
#ifdef __GLIBC__
  // Blocks that were mapped on their own are unmapped when freed, whatever the trim threshold; so map none.
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1;
#else
  return false;
#endif
}

}  // namespace xt
