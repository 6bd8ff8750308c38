// Eight float32 lanes as plain arrays, for any compiler and any processor; the loops are written
// for auto-vectorization. The meaning of each operation is documented in avx2.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd/convert.h"

namespace jax_gluon::cpu {
namespace {

struct Portable {
  static constexpr int kRegisters = 16;
  static constexpr int kLanes = 8;
  // 4 rows x 1 vector = 8 accumulators of four lanes, within the 16 registers of SSE2.
  static constexpr int kTileRows = 4, kTileVectors = 1;
  static constexpr int kRowLanes = 1, kSubtileVectors = 16;
  static constexpr int kInt8Group = 4, kTileKeyBias = 128;
  static constexpr bool kShiftsProbabilities = false;

  struct F {
    float v[kLanes];
  };
  struct I {
    int32_t v[kLanes];
  };

  template <class Out, class Fn>
  static Out map(Fn fn) {
    Out out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = fn(i);
    return out;
  }

  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F set1(float x) {
    return map<F>([=](int) { return x; });
  }
  static F zero() { return set1(0.0f); }
  static I load_i32(const void* p) {
    I x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store_i32(void* p, I x) { std::memcpy(p, &x, sizeof x); }
  static I load_bytes(const void* p, int count) {
    I x{};
    std::memcpy(&x, p, static_cast<size_t>(count));
    return x;
  }
  static I set1_i32(int32_t x) {
    return map<I>([=](int) { return x; });
  }

  static F add(F a, F b) {
    return map<F>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return map<F>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return map<F>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return map<F>([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return map<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F max(F a, F b) {
    return map<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(F x) {
    return map<F>([&](int i) { return std::fabs(x.v[i]); });
  }
  static F to_float(I x) {
    return map<F>([&](int i) { return static_cast<float>(x.v[i]); });
  }
  // Round to nearest even without a call; |x| < 2^22.
  static I to_int(F x) {
    return map<I>(
        [&](int i) { return static_cast<int32_t>(bits_of(x.v[i] + 12582912.0f)) - 0x4b400000; });
  }

  static F where_less(F a, F b, F x, F y) {
    return map<F>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
  }
  static F where_nonzero(F p, F x) {
    return map<F>([&](int i) { return p.v[i] != 0.0f ? x.v[i] : 0.0f; });
  }
  static F where_visible(const uint8_t* visible, F x, F y) {
    return map<F>([&](int i) { return visible[i] ? x.v[i] : y.v[i]; });
  }
  static F where_between(int begin, int end, F x, F y) {
    return map<F>([&](int i) { return i >= begin && i < end ? x.v[i] : y.v[i]; });
  }

  static float reduce_add(F x) {
    return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
  }
  static float reduce_max(F x) {
    float m = x.v[0];
    for (int i = 1; i < kLanes; ++i) m = x.v[i] > m ? x.v[i] : m;
    return m;
  }

  template <int kDegree>
  static F exp2(F x) {
    static_assert(kDegree == 5 || kDegree == 3, "degree 5 (7.5e-8) or 3 (7.5e-5)");
    return map<F>([&](int i) {
      const float shifted = x.v[i] + 12583039.0f, f = x.v[i] - (shifted - 12583039.0f);
      float p;
      if (kDegree == 5) {
        p = f * 0.00132764721f + 0.0096755414f;
        p = f * p + 0.0555071327f;
        p = f * p + 0.240221197f;
        p = f * p + 0.693146967f;
        p = f * p + 1.00000007f;
      } else {
        p = f * 0.0551716696f + 0.242611126f;
        p = f * p + 0.693260986f;
        p = f * p + 0.999928073f;
      }
      const float y = p * float_from_bits(bits_of(shifted) << 23);
      return x.v[i] < -126.0f ? 0.0f : y;
    });
  }

  static F load_bf16(const uint16_t* p) {
    return map<F>([&](int i) { return float_from_bf16(p[i]); });
  }
  static F load_f16(const uint16_t* p) {
    return map<F>([&](int i) { return float_from_f16(p[i]); });
  }
  static F load_s8(const int8_t* p) {
    return map<F>([&](int i) { return static_cast<float>(p[i]); });
  }
  static void load_nibbles(const uint8_t* p, F* low, F* high) {
    *low = map<F>([&](int i) { return static_cast<float>((p[i] & 15) - 8); });
    *high = map<F>([&](int i) { return static_cast<float>((p[i] >> 4) - 8); });
  }
  static void deinterleave(F a, F b, F* out) {
    const auto at = [&](int i) { return i < kLanes ? a.v[i] : b.v[i - kLanes]; };
    const F even = map<F>([&](int i) { return at(2 * i); });
    const F odd = map<F>([&](int i) { return at(2 * i + 1); });
    out[0] = even;
    out[1] = odd;
  }
  static void store_f16(uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = f16_from_float(x.v[i]);
  }
  static void store_s8(int8_t* p, I x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x.v[i]);
  }

  // u8 . s8, 4 products a lane.
  static I dot(I acc, I u8, I s8) {
    uint8_t a[4 * kLanes];
    int8_t b[4 * kLanes];
    std::memcpy(a, &u8, sizeof a);
    std::memcpy(b, &s8, sizeof b);
    return map<I>([&](int i) {
      return acc.v[i] + a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] +
             a[4 * i + 2] * b[4 * i + 2] + a[4 * i + 3] * b[4 * i + 3];
    });
  }
  static I dot_keys(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_values(I acc, I value, I probability) { return dot(acc, probability, value); }

  static constexpr int kKeyBias = 0, kMaxWeight = 255;
  static I dot_key_bytes(I acc, I key, I query) {
    int8_t a[4 * kLanes], b[4 * kLanes];
    std::memcpy(a, &key, sizeof a);
    std::memcpy(b, &query, sizeof b);
    return map<I>([&](int i) {
      return acc.v[i] + a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] +
             a[4 * i + 2] * b[4 * i + 2] + a[4 * i + 3] * b[4 * i + 3];
    });
  }
  static I dot_key_nibbles(I acc, I bytes, I even, I odd) {
    I low, high;
    split_nibbles(bytes, &low, &high);
    return dot(dot(acc, low, even), high, odd);
  }
  static I dot_weights(I acc, I weights, I codes) { return dot(acc, weights, codes); }
  static I dot_nibble_weights(I acc, I weights, I codes) { return dot(acc, weights, codes); }
  static void split_nibbles(I bytes, I* low, I* high) {
    *low = map<I>([&](int i) { return bytes.v[i] & 0x0f0f0f0f; });
    *high = map<I>([&](int i) { return bytes.v[i] >> 4 & 0x0f0f0f0f; });
  }
  static void interleave(I x, I y, I z, I w, I* out) {
    char a[4 * kLanes], b[4 * kLanes], c[4 * kLanes], d[4 * kLanes];
    std::memcpy(a, &x, sizeof a);
    std::memcpy(b, &y, sizeof b);
    std::memcpy(c, &z, sizeof c);
    std::memcpy(d, &w, sizeof d);
    for (int v = 0; v < 4; ++v) {
      char bytes[4 * kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int from = i / 4 * 16 + 4 * v + i % 4;
        bytes[4 * i] = a[from];
        bytes[4 * i + 1] = b[from];
        bytes[4 * i + 2] = c[from];
        bytes[4 * i + 3] = d[from];
      }
      std::memcpy(&out[v], bytes, sizeof bytes);
    }
  }
  static I sum_each(const I* x) {
    return map<I>([&](int i) {
      int32_t sum = 0;
      for (int32_t lane : x[i].v) sum += lane;
      return sum;
    });
  }
  static I permute(I table, I index) {
    return map<I>([&](int i) { return table.v[index.v[i]]; });
  }
  static F permute(F table, I index) {
    return map<F>([&](int i) { return table.v[index.v[i]]; });
  }
  static I xor_i32(I a, I b) {
    return map<I>([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  static void multiply_wide(I x, uint32_t factor, I* low, I* high) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = uint64_t{static_cast<uint32_t>(x.v[i])} * factor;
      low->v[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
      high->v[i] = static_cast<int32_t>(product >> 32);
    }
  }
  static void store_kept(uint8_t* p, I x, uint32_t threshold) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t both = static_cast<uint32_t>(x.v[i]);
      p[i] = (both & 0xffff) >= threshold;
      p[kLanes + i] = both >> 16 >= threshold;
    }
  }
  static I add_i32(I a, I b) {
    return map<I>([&](int i) {
      return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
    });
  }
  static I pack_bytes(I a, I b, I c, I d) {
    I out;
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t bytes[] = {static_cast<uint8_t>(a.v[i]), static_cast<uint8_t>(b.v[i]),
                               static_cast<uint8_t>(c.v[i]), static_cast<uint8_t>(d.v[i])};
      std::memcpy(&out.v[i], bytes, sizeof bytes);
    }
    return out;
  }
  static void store_u8(uint8_t* p, I x) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x.v[i]);
  }

  static void store_probabilities(void* p, const F* x) {
    for (int j = 0; j < 4; ++j) {
      const I codes = to_int(x[j]);
      for (int i = 0; i < kLanes; ++i) {
        static_cast<uint8_t*>(p)[kLanes * j + i] = static_cast<uint8_t>(codes.v[i]);
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
