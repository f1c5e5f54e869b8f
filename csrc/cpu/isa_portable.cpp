#include "cpu/kernels.h"
#include "cpu/simd/swiglu.h"
#include "cpu/simd/unpermute.h"
#include "cpu/simd/vec_portable.h"

namespace xt::cpu {

const Kernels kernels_portable = {
    "portable",
    swiglu_rows<portable::Vec>,
    swiglu_bwd_rows<portable::Vec>,
    unpermute_tokens<portable::Vec>,
    unpermute_bwd_tokens<portable::Vec>,
};

}  // namespace xt::cpu
