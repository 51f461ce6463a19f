// What stands before the CUDA C of a kernel when it is compiled as C++ for the CPU.
#pragma once
#include "instructions.hpp"
#include "sm_90a.hpp"

// An argument as TVM's host code passes it.
struct Argument { int32_t type; uint32_t zero; union { int64_t i; double d; void* p; }; };

#define CUDART_INF_F (__builtin_inff())
#define CUDART_NAN_F (__builtin_nanf(""))
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(n)
