// NEON with dot products of bytes (FEAT_DotProd): Apple M1, Neoverse N1.
#pragma once

#include "cpu/simd/neon.h"

namespace jax_gluon::cpu {
namespace {

struct NeonDot : Neon {
  static constexpr int kInt8Group = 4;
  // Its products are of two signed or two unsigned bytes.
  static constexpr bool kShiftsProbabilities = true;

  // acc += s8 . s8, 4 products a lane.
  static I dot(I acc, I a, I b) {
    return {dot_half(acc.low, a.low, b.low), dot_half(acc.high, a.high, b.high)};
  }
  template <int kLane>
  static I dot_keys_lane(I acc, I key, Row query) {
    const int8x16_t b = vreinterpretq_s8_s32(query);
    return {vdotq_laneq_s32(acc.low, vreinterpretq_s8_s32(key.low), b, kLane),
            vdotq_laneq_s32(acc.high, vreinterpretq_s8_s32(key.high), b, kLane)};
  }
  // Of probabilities less 128: what this adds is `shift` of all values, to be taken away again.
  template <int kLane>
  static I dot_values_lane(I acc, I value, Row probability) {
    return dot_keys_lane<kLane>(acc, value, probability);
  }
  static Row load_shifted_row(const void* p) {
    return veorq_s32(load_row(p), vdupq_n_s32(static_cast<int32_t>(0x80808080)));
  }
  static I add_shift(I shift, I value) {
    return dot(shift, value, set1_i32(static_cast<int32_t>(0x80808080)));
  }
  static I without_shift(I acc, I shift) {
    return {vsubq_s32(acc.low, shift.low), vsubq_s32(acc.high, shift.high)};
  }

  static I dot_keys(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_values(I acc, I value, I probability) {
    const I flip = set1_i32(static_cast<int32_t>(0x80808080));
    return without_shift(dot(acc, value, xor_i32(probability, flip)),
                         add_shift(set1_i32(0), value));
  }

  static I dot_key_bytes(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_key_nibbles(I acc, I bytes, I even, I odd) {
    I low, high;
    split_nibbles(bytes, &low, &high);
    return dot(dot(acc, low, even), high, odd);
  }
  static I dot_weights(I acc, I weights, I codes) { return dot(acc, codes, weights); }
  static I dot_nibble_weights(I acc, I weights, I codes) {
    const auto half = [](int32x4_t sum, int32x4_t x, int32x4_t y) {
      return vreinterpretq_s32_u32(
          vdotq_u32(vreinterpretq_u32_s32(sum), vreinterpretq_u8_s32(x), vreinterpretq_u8_s32(y)));
    };
    return {half(acc.low, weights.low, codes.low), half(acc.high, weights.high, codes.high)};
  }

  // 4 * kLanes integers in [0, 255], rounded, as bytes in key order.
  static void store_probabilities(void* p, const F* x) {
    uint8_t* out = static_cast<uint8_t*>(p);
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t first = vreinterpretq_u8_s16(words(to_int(x[2 * i])));
      const uint8x16_t second = vreinterpretq_u8_s16(words(to_int(x[2 * i + 1])));
      vst1q_u8(out + 16 * i, vuzp1q_u8(first, second));
    }
  }

 protected:
  static int32x4_t dot_half(int32x4_t acc, int32x4_t a, int32x4_t b) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
