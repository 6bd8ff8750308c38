// The vector types that host programs share with kernels.
#pragma once

#include <stdint.h>

#define SOFTMETAL_SIMD(type, name)                                 \
  typedef __attribute__((ext_vector_type(2))) type simd_##name##2; \
  typedef __attribute__((ext_vector_type(3))) type simd_##name##3; \
  typedef __attribute__((ext_vector_type(4))) type simd_##name##4; \
  typedef simd_##name##2 vector_##name##2;                         \
  typedef simd_##name##3 vector_##name##3;                         \
  typedef simd_##name##4 vector_##name##4;
SOFTMETAL_SIMD(float, float)
SOFTMETAL_SIMD(double, double)
SOFTMETAL_SIMD(int32_t, int)
SOFTMETAL_SIMD(uint32_t, uint)
SOFTMETAL_SIMD(int16_t, short)
SOFTMETAL_SIMD(uint16_t, ushort)
SOFTMETAL_SIMD(int8_t, char)
SOFTMETAL_SIMD(uint8_t, uchar)
SOFTMETAL_SIMD(_Float16, half)
#undef SOFTMETAL_SIMD

typedef struct {
  simd_float2 columns[2];
} simd_float2x2;
typedef struct {
  simd_float3 columns[3];
} simd_float3x3;
typedef struct {
  simd_float4 columns[4];
} simd_float4x4;
typedef simd_float2x2 matrix_float2x2;
typedef simd_float3x3 matrix_float3x3;
typedef simd_float4x4 matrix_float4x4;

#ifdef __cplusplus
namespace simd {
using float2 = ::simd_float2;
using float3 = ::simd_float3;
using float4 = ::simd_float4;
using int2 = ::simd_int2;
using int3 = ::simd_int3;
using int4 = ::simd_int4;
using uint2 = ::simd_uint2;
using uint3 = ::simd_uint3;
using uint4 = ::simd_uint4;
using half2 = ::simd_half2;
using half3 = ::simd_half3;
using half4 = ::simd_half4;
using float2x2 = ::simd_float2x2;
using float3x3 = ::simd_float3x3;
using float4x4 = ::simd_float4x4;
}  // namespace simd
#endif

#if defined(__OBJC__) || defined(__cplusplus)
static inline __attribute__((overloadable)) simd_float2 simd_make_float2(float x, float y) {
  return (simd_float2){x, y};
}
static inline __attribute__((overloadable)) simd_float3 simd_make_float3(float x, float y,
                                                                         float z) {
  return (simd_float3){x, y, z};
}
static inline __attribute__((overloadable)) simd_float4 simd_make_float4(float x, float y, float z,
                                                                         float w) {
  return (simd_float4){x, y, z, w};
}
#endif
