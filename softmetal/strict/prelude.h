// The Metal standard library as declarations, for the check of address spaces: clang reads a
// program of Metal as C++ for OpenCL, where device is __global, constant __constant, threadgroup
// __local and thread __private. Nothing here runs, so functions have bodies only where a constant
// expression may call them, and values only where a template argument may be one.
//
// What takes a plain pointer, reference or `this` here takes one of any space but constant: the
// compiler's generic address space. Programs have no such thing, see compiler/tree_errors.cc.
#pragma once

#define SOFTMETAL_STRICT 1
#define SOFTMETAL_FUNC inline
#define SOFTMETAL_CONSTANT __constant
#define SOFTMETAL_THREAD __private

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma OPENCL EXTENSION __cl_clang_variadic_functions : enable
#pragma OPENCL EXTENSION __cl_clang_bitfields : enable

// Names of Metal, or of a program's own, that mean something else in OpenCL. Diagnostics are shown
// without the prefix.
#define atomic_flag softmetal_name_atomic_flag
#define atomic_float softmetal_name_atomic_float
#define atomic_int softmetal_name_atomic_int
#define atomic_long softmetal_name_atomic_long
#define atomic_uint softmetal_name_atomic_uint
#define atomic_ulong softmetal_name_atomic_ulong
#define event_t softmetal_name_event_t
#define generic softmetal_name_generic
#define global softmetal_name_global
#define local softmetal_name_local
#define pipe softmetal_name_pipe
#define printf softmetal_name_printf
#define queue_t softmetal_name_queue_t
#define read_only softmetal_name_read_only
#define read_write softmetal_name_read_write
#define sampler_t softmetal_name_sampler_t
#define to_global softmetal_name_to_global
#define to_local softmetal_name_to_local
#define to_private softmetal_name_to_private
#define vec_step softmetal_name_vec_step
#define write_only softmetal_name_write_only

// clang-format off: in order of dependence
#include "strict/types.h"
#include "msl/metal_type_traits"
#include "msl/metal_limits"
#include "msl/metal_constants"
#include "strict/functions.h"
#include "msl/metal_variants"
#include "strict/memory.h"
#include "strict/simdgroups.h"
#include "msl/metal_internals"
#include "msl/metal_unsupported"
#include "msl/simd/simd.h"
// clang-format on

#define device __global
#define constant const __constant
#define threadgroup __local
#define thread __private
