// Eight float32 lanes in two registers of NEON, which every arm64 processor has. The meaning of
// each operation is documented in avx2.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

struct Neon {
  // Vectors that 32 registers hold, two each.
  static constexpr int kRegisters = 16;
  static constexpr int kLanes = 8;
  // Register tile: 8 rows x 8 columns = 16 accumulators, 2 of keys or values, 2 of queries or 8 of
  // probabilities. As many accumulators as four multipliers of latency 4 keep busy.
  static constexpr int kTileRows = 8, kTileVectors = 1;
  // A product takes a lane of a register: four of a row are loaded at once.
  static constexpr int kRowLanes = 4;
  static constexpr int kSubtileVectors = 8;
  // As 16-bit numbers, which the multiply-adds take by lane as well; products of bytes would have
  // to be added in pairs.
  static constexpr int kInt8Group = 2, kTileKeyBias = 0;
  static constexpr bool kShiftsProbabilities = false;

  struct F {
    float32x4_t low, high;
  };
  struct I {
    int32x4_t low, high;
  };

  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, F x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
  }
  static F set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F zero() { return set1(0.0f); }
  static I load_i32(const void* p) {
    const int8_t* bytes = static_cast<const int8_t*>(p);
    return {vreinterpretq_s32_s8(vld1q_s8(bytes)), vreinterpretq_s32_s8(vld1q_s8(bytes + 16))};
  }
  static void store_i32(void* p, I x) {
    int8_t* bytes = static_cast<int8_t*>(p);
    vst1q_s8(bytes, vreinterpretq_s8_s32(x.low));
    vst1q_s8(bytes + 16, vreinterpretq_s8_s32(x.high));
  }
  static I load_bytes(const void* p, int count) {
    int8_t bytes[32] = {};
    std::memcpy(bytes, p, static_cast<size_t>(count));
    return load_i32(bytes);
  }
  static I set1_i32(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }

  // Four lanes of a row.
  using Row = int32x4_t;
  static Row load_row(const void* p) {
    Row x = vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t*>(p)));
    // Else GCC loads them one by one, and spills them.
    __asm__("" : "+w"(x));
    return x;
  }

  static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static F sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static F fma(F a, F b, F c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  // acc + a * lane of the row.
  template <int kLane>
  static F fma_lane(F acc, F a, Row row) {
    const float32x4_t b = vreinterpretq_f32_s32(row);
    return {vfmaq_laneq_f32(acc.low, a.low, b, kLane), vfmaq_laneq_f32(acc.high, a.high, b, kLane)};
  }
  // Not vmaxq, which gives NaN where either is.
  static F max(F a, F b) { return where_less(b, a, a, b); }
  static F abs(F x) { return {vabsq_f32(x.low), vabsq_f32(x.high)}; }
  static F to_float(I x) { return {vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
  static I to_int(F x) { return {vcvtnq_s32_f32(x.low), vcvtnq_s32_f32(x.high)}; }

  static F where_less(F a, F b, F x, F y) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), x.low, y.low),
            vbslq_f32(vcltq_f32(a.high, b.high), x.high, y.high)};
  }
  static F where_nonzero(F p, F x) {
    const auto half = [](float32x4_t q, float32x4_t y) {
      return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vceqzq_f32(q)));
    };
    return {half(p.low, x.low), half(p.high, x.high)};
  }
  static F where_visible(const uint8_t* visible, F x, F y) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(visible));
    const uint32x4_t low = vmovl_u16(vget_low_u16(wide)), high = vmovl_high_u16(wide);
    return {vbslq_f32(vtstq_u32(low, low), x.low, y.low),
            vbslq_f32(vtstq_u32(high, high), x.high, y.high)};
  }
  static F where_between(int begin, int end, F x, F y) {
    const auto half = [=](int32_t first, float32x4_t a, float32x4_t b) {
      static constexpr int32_t kCount[4] = {0, 1, 2, 3};
      const int32x4_t lane = vaddq_s32(vld1q_s32(kCount), vdupq_n_s32(first));
      return vbslq_f32(
          vandq_u32(vcgeq_s32(lane, vdupq_n_s32(begin)), vcltq_s32(lane, vdupq_n_s32(end))), a, b);
    };
    return {half(0, x.low, y.low), half(4, x.high, y.high)};
  }

  static float reduce_add(F x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }
  static float reduce_max(F x) { return vmaxnmvq_f32(vmaxnmq_f32(x.low, x.high)); }

  template <int kDegree>
  static JAX_GLUON_INLINE F exp2(F x) {
    return {exp2_half<kDegree>(x.low), exp2_half<kDegree>(x.high)};
  }

  static F load_bf16(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
  }
  static F load_f16(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p);
    return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x))),
            vcvt_high_f32_f16(vreinterpretq_f16_u16(x))};
  }
  static F load_s8(const int8_t* p) { return floats(vmovl_s8(vld1_s8(p))); }
  static void load_nibbles(const uint8_t* p, F* low, F* high) {
    const uint8x8_t bytes = vld1_u8(p), bias = vdup_n_u8(8);
    const auto codes = [&](uint8x8_t nibbles) {
      return floats(vreinterpretq_s16_u16(vsubl_u8(nibbles, bias)));
    };
    *low = codes(vand_u8(bytes, vdup_n_u8(15)));
    *high = codes(vshr_n_u8(bytes, 4));
  }
  static void deinterleave(F a, F b, F* out) {
    out[0] = {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)};
    out[1] = {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)};
  }
  static void store_f16(uint16_t* p, F x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high)));
  }
  static void store_s8(int8_t* p, I x) { vst1_s8(p, vmovn_s16(words(x))); }

  // acc += codes . codes: 2 products of 16-bit numbers a lane.
  static I dot(I acc, I a, I b) {
    const auto half = [](int32x4_t sum, int32x4_t x, int32x4_t y) {
      const int16x8_t left = vreinterpretq_s16_s32(x), right = vreinterpretq_s16_s32(y);
      return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(left), vget_low_s16(right)),
                                       vmull_high_s16(left, right)));
    };
    return {half(acc.low, a.low, b.low), half(acc.high, a.high, b.high)};
  }
  // The same of a pair of a row: the even numbers of lanes with its first, the odd ones with its
  // second.
  template <int kLane>
  static I dot_lane(I acc, I a, Row row) {
    const int16x8_t low = vreinterpretq_s16_s32(a.low), high = vreinterpretq_s16_s32(a.high);
    const int16x8_t even = vuzp1q_s16(low, high), odd = vuzp2q_s16(low, high);
    const int16x8_t b = vreinterpretq_s16_s32(row);
    acc.low = vmlal_laneq_s16(acc.low, vget_low_s16(even), b, 2 * kLane);
    acc.high = vmlal_high_laneq_s16(acc.high, even, b, 2 * kLane);
    acc.low = vmlal_laneq_s16(acc.low, vget_low_s16(odd), b, 2 * kLane + 1);
    acc.high = vmlal_high_laneq_s16(acc.high, odd, b, 2 * kLane + 1);
    return acc;
  }
  template <int kLane>
  static I dot_keys_lane(I acc, I key, Row query) {
    return dot_lane<kLane>(acc, key, query);
  }
  template <int kLane>
  static I dot_values_lane(I acc, I value, Row probability) {
    return dot_lane<kLane>(acc, value, probability);
  }
  static I dot_keys(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_values(I acc, I value, I probability) { return dot(acc, value, probability); }

  // Bytes. Sums of two products fit 16 bits, as a query's codes and weights are within [-127, 127].
  static constexpr int kKeyBias = 0, kMaxWeight = 127;
  static I dot_key_bytes(I acc, I key, I query) {
    const auto half = [](int32x4_t sum, int32x4_t x, int32x4_t y) {
      const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(y);
      return vpadalq_s16(sum,
                         vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
    };
    return {half(acc.low, key.low, query.low), half(acc.high, key.high, query.high)};
  }
  static I dot_key_nibbles(I acc, I bytes, I even, I odd) {
    I low, high;
    split_nibbles(bytes, &low, &high);
    return dot_key_bytes(dot_key_bytes(acc, low, even), high, odd);
  }
  static I dot_weights(I acc, I weights, I codes) { return dot_key_bytes(acc, codes, weights); }
  static I dot_nibble_weights(I acc, I weights, I codes) {
    const auto half = [](int32x4_t sum, int32x4_t x, int32x4_t y) {
      const uint8x16_t a = vreinterpretq_u8_s32(x), b = vreinterpretq_u8_s32(y);
      const uint16x8_t pairs =
          vpaddq_u16(vmull_u8(vget_low_u8(a), vget_low_u8(b)), vmull_high_u8(a, b));
      return vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sum), pairs));
    };
    return {half(acc.low, weights.low, codes.low), half(acc.high, weights.high, codes.high)};
  }
  static void split_nibbles(I bytes, I* low, I* high) {
    const auto first = [](int32x4_t x) {
      return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(15)));
    };
    const auto second = [](int32x4_t x) {
      return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
    };
    *low = {first(bytes.low), first(bytes.high)};
    *high = {second(bytes.low), second(bytes.high)};
  }
  static void interleave(I x, I y, I z, I w, I* out) {
    const auto half = [](int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d, int32x4_t* to) {
      const auto zip = [](uint8x16_t low, uint8x16_t high, int32x4_t* first) {
        const uint16x8_t u = vreinterpretq_u16_u8(low), v = vreinterpretq_u16_u8(high);
        first[0] = vreinterpretq_s32_u16(vzip1q_u16(u, v));
        first[1] = vreinterpretq_s32_u16(vzip2q_u16(u, v));
      };
      const uint8x16_t e = vreinterpretq_u8_s32(a), f = vreinterpretq_u8_s32(b);
      const uint8x16_t g = vreinterpretq_u8_s32(c), h = vreinterpretq_u8_s32(d);
      zip(vzip1q_u8(e, f), vzip1q_u8(g, h), to);
      zip(vzip2q_u8(e, f), vzip2q_u8(g, h), to + 2);
    };
    int32x4_t low[4], high[4];
    half(x.low, y.low, z.low, w.low, low);
    half(x.high, y.high, z.high, w.high, high);
    for (int v = 0; v < 4; ++v) out[v] = {low[v], high[v]};
  }
  static JAX_GLUON_INLINE I sum_each(const I* x) {
    const auto lanes = [](I y) { return vaddq_s32(y.low, y.high); };
    const auto fours = [&](const I* y) {
      return vpaddq_s32(vpaddq_s32(lanes(y[0]), lanes(y[1])), vpaddq_s32(lanes(y[2]), lanes(y[3])));
    };
    return {fours(x), fours(x + 4)};
  }
  static I permute(I table, I index) {
    const uint8x16x2_t bytes = {
        {vreinterpretq_u8_s32(table.low), vreinterpretq_u8_s32(table.high)}};
    const auto half = [&](int32x4_t lane) {
      // The four bytes of each lane.
      const int32x4_t at = vmlaq_n_s32(vdupq_n_s32(0x03020100), lane, 0x04040404);
      return vreinterpretq_s32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_s32(at)));
    };
    return {half(index.low), half(index.high)};
  }
  static F permute(F table, I index) {
    const I x =
        permute(I{vreinterpretq_s32_f32(table.low), vreinterpretq_s32_f32(table.high)}, index);
    return {vreinterpretq_f32_s32(x.low), vreinterpretq_f32_s32(x.high)};
  }
  static I add_i32(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static I xor_i32(I a, I b) { return {veorq_s32(a.low, b.low), veorq_s32(a.high, b.high)}; }
  static void multiply_wide(I x, uint32_t factor, I* low, I* high) {
    const auto half = [factor](int32x4_t y, int32x4_t* first, int32x4_t* second) {
      const uint32x4_t z = vreinterpretq_u32_s32(y);
      const int32x4_t a = vreinterpretq_s32_u64(vmull_n_u32(vget_low_u32(z), factor));
      const int32x4_t b = vreinterpretq_s32_u64(vmull_high_n_u32(z, factor));
      *first = vuzp1q_s32(a, b);
      *second = vuzp2q_s32(a, b);
    };
    half(x.low, &low->low, &high->low);
    half(x.high, &low->high, &high->high);
  }
  static void store_kept(uint8_t* p, I x, uint32_t threshold) {
    const uint16x8_t least = vdupq_n_u16(static_cast<uint16_t>(threshold));
    const uint16x8_t a = vreinterpretq_u16_s32(x.low), b = vreinterpretq_u16_s32(x.high);
    const auto kept = [&](uint16x8_t numbers) { return vmovn_u16(vcgeq_u16(numbers, least)); };
    const uint8x16_t all = vcombine_u8(kept(vuzp1q_u16(a, b)), kept(vuzp2q_u16(a, b)));
    vst1q_u8(p, vandq_u8(all, vdupq_n_u8(1)));
  }
  static I pack_bytes(I a, I b, I c, I d) {
    const auto half = [](int32x4_t x, int32x4_t y, int32x4_t z, int32x4_t w) {
      return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(x, y, 8), z, 16), w, 24);
    };
    return {half(a.low, b.low, c.low, d.low), half(a.high, b.high, c.high, d.high)};
  }
  static void store_u8(uint8_t* p, I x) { vst1_u8(p, vmovn_u16(vreinterpretq_u16_s16(words(x)))); }

  // 2 * kLanes integers in [0, 255], rounded, as 16-bit numbers in key order.
  static void store_probabilities(void* p, const F* x) {
    int16_t* out = static_cast<int16_t*>(p);
    vst1q_s16(out, words(to_int(x[0])));
    vst1q_s16(out + 8, words(to_int(x[1])));
  }

 protected:
  // The low halves of lanes.
  static int16x8_t words(I x) {
    return vuzp1q_s16(vreinterpretq_s16_s32(x.low), vreinterpretq_s16_s32(x.high));
  }
  static F floats(int16x8_t x) {
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
  }

  // Called, it would spill what its callers keep in registers.
  template <int kDegree>
  static JAX_GLUON_INLINE float32x4_t exp2_half(float32x4_t x) {
    const float32x4_t magic = vdupq_n_f32(12582912.0f + 127.0f);
    const float32x4_t shifted = vaddq_f32(x, magic);
    const float32x4_t f = vsubq_f32(x, vsubq_f32(shifted, magic));
    const auto step = [f](float32x4_t p, float c) { return vfmaq_f32(vdupq_n_f32(c), f, p); };
    float32x4_t p;
    if constexpr (kDegree == 5) {
      p = step(vdupq_n_f32(0.00132764721f), 0.0096755414f);
      p = step(p, 0.0555071327f);
      p = step(p, 0.240221197f);
      p = step(p, 0.693146967f);
      p = step(p, 1.00000007f);
    } else {
      static_assert(kDegree == 3, "degree 5 (7.5e-8) or 3 (7.5e-5)");
      p = step(vdupq_n_f32(0.0551716696f), 0.242611126f);
      p = step(p, 0.693260986f);
      p = step(p, 0.999928073f);
    }
    const float32x4_t power =
        vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23));
    const uint32x4_t tiny = vcltq_f32(x, vdupq_n_f32(-126.0f));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vmulq_f32(p, power)), tiny));
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
