// Scalar conversions between float32 and the 16-bit float formats, round to nearest even.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_call.h"

namespace jax_gluon::cpu {
namespace {

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_from_bf16(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t bf16_from_float(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The smallest bfloat16 number that is not below finite x; NaN stays NaN.
inline float round_up_to_bf16(float x) {
  if (x != x) return x;
  const uint32_t bits = bits_of(x);
  const float up = float_from_bits((bits >> 31 ? bits : bits + 0xffffu) & 0xffff0000u);
  const float largest = float_from_bits(0x7f7f0000u);
  return std::min(std::max(up, -largest), largest);
}

inline float float_from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t exponent = (x >> 10) & 0x1fu, mantissa = x & 0x3ffu;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t f16_from_float(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lines the result's last place up with float32's, which rounds it.
    const float aligned = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(aligned) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline float float_at(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[index];
    case DType::kBF16:
      return float_from_bf16(static_cast<const uint16_t*>(data)[index]);
    case DType::kF16:
      return float_from_f16(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<float>(static_cast<const int8_t*>(data)[index]);
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
