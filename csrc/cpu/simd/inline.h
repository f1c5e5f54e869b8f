// Code in csrc/cpu/simd is compiled once per instruction set. Everything in it is a template over the ISA's Vec or
// forced inline, so that the linker can never let one ISA's copy stand in for another's; for the same reason nothing
// here calls inline functions of the standard library.
#pragma once
#define XT_INLINE inline __attribute__((always_inline))
