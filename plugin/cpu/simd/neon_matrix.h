// NEON with products of matrices, of bytes and of bfloat16 (FEAT_I8MM, FEAT_BF16): Apple M2,
// Neoverse V1 and N2, and later.
#pragma once

#include "cpu/simd/neon_dot.h"

namespace jax_gluon::cpu {
namespace {

struct NeonMatrix : NeonDot {
  static constexpr int kMaxWeight = 255;
  // Register tile of blocks: 12 rows x 8 columns = 24 accumulators, 4 of keys or values, and 2 of
  // rows at a time. With 8 rows, loads would take the place of products.
  static constexpr int kBlockTileRows = 12;

  // acc += u8 . s8, 4 products a lane.
  static I dot_weights(I acc, I weights, I codes) {
    const auto half = [](int32x4_t sum, int32x4_t x, int32x4_t y) {
      return vusdotq_s32(sum, vreinterpretq_u8_s32(x), vreinterpretq_s8_s32(y));
    };
    return {half(acc.low, weights.low, codes.low), half(acc.high, weights.high, codes.high)};
  }
  static I dot_values(I acc, I value, I probability) {
    return dot_weights(acc, probability, value);
  }

  // acc[i][j] += two rows a[i] . two rows b[j], each of 8 bytes: codes, probabilities as unsigned
  // bytes with codes, or bfloat16.
  static Row multiply_codes(Row acc, Row a, Row b) {
    return vmmlaq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
  static Row multiply_probabilities(Row acc, Row a, Row b) {
    return vusmmlaq_s32(acc, vreinterpretq_u8_s32(a), vreinterpretq_s8_s32(b));
  }
  static Row multiply_bf16(Row acc, Row a, Row b) {
    // Around the intrinsic GCC copies accumulators.
    __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
  }
  static void store_row(void* p, Row x) {
    vst1q_s8(static_cast<int8_t*>(p), vreinterpretq_s8_s32(x));
  }
  static Row zero_row() { return vdupq_n_s32(0); }
  // The first halves of a and b, and the second ones.
  static void zip_halves(Row a, Row b, Row* out) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    out[0] = vreinterpretq_s32_s64(vzip1q_s64(x, y));
    out[1] = vreinterpretq_s32_s64(vzip2q_s64(x, y));
  }
  static F floats_of(Row low, Row high) {
    return {vreinterpretq_f32_s32(low), vreinterpretq_f32_s32(high)};
  }
  static I ints_of(Row low, Row high) { return {low, high}; }

  // kLanes bfloat16, rounded, in key order.
  static void store_bf16(void* p, F x) {
    const bfloat16x8_t both = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x.low), x.high);
    std::memcpy(p, &both, sizeof both);
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
