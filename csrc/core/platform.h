// The qualifier that lets one function serve the CPU engine, the CUDA engine and the host shim.
#pragma once

// Always inlined, so that a function takes the instruction set of whoever calls it: the CPU engine
// compiles one body for AVX-512, AVX2 and the baseline in a single translation unit.
#if defined(__CUDACC__)
#define FUSED_ADAMW_HD __host__ __device__ __forceinline__
#define FUSED_ADAMW_UNROLL _Pragma("unroll")
#define FUSED_ADAMW_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSED_ADAMW_HD inline __attribute__((always_inline))
#define FUSED_ADAMW_UNROLL
#define FUSED_ADAMW_NO_UNROLL
#endif
