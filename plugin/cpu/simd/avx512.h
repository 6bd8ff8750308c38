// Sixteen float32 lanes: AVX-512 F, BW, DQ, VL, VNNI, and BF16 where the processor has it.
// JAX_GLUON_EMULATE_AVX512 compiles the same text on emulated intrinsics, for tests on machines
// without AVX-512.
#pragma once

#ifdef JAX_GLUON_EMULATE_AVX512
#include "cpu/simd/avx512_emulated.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

struct Avx512 {
  static constexpr int kRegisters = 32;
  static constexpr int kLanes = 16;
  // Register tile: 12 rows x 2 vectors = 24 accumulators, 2 operands of 32 registers.
  static constexpr int kTileRows = 12, kTileVectors = 2;
  static constexpr int kRowLanes = 1, kSubtileVectors = 16;
  static constexpr int kInt8Group = 4, kTileKeyBias = 128;  // vpdpbusd
  static constexpr bool kShiftsProbabilities = false;
  // Whether there are registers that hold matrices.
  static constexpr bool kHasTiles = false;
  struct Tiles {};

  // 2^f for f in [0, 1).
  static constexpr float kCubic[4] = {0.999925219f, 0.695833536f, 0.22606716f, 0.0780245234f};

  using F = __m512;
  using I = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static I load_i32(const void* p) { return _mm512_loadu_si512(p); }
  static void store_i32(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I load_bytes(const void* p, int count) {
    return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), p);
  }
  static I set1_i32(int32_t x) { return _mm512_set1_epi32(x); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I to_int(F x) { return _mm512_cvtps_epi32(x); }

  static F where_less(F a, F b, F x, F y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
  }
  static F where_nonzero(F p, F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
  }
  static F where_visible(const uint8_t* visible, F x, F y) {
    const __m512i wide =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(visible)));
    return _mm512_mask_mov_ps(y, _mm512_test_epi32_mask(wide, wide), x);
  }
  static F where_between(int begin, int end, F x, F y) {
    const auto below = [](int n) {
      return static_cast<uint32_t>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
    };
    return _mm512_mask_mov_ps(y, static_cast<__mmask16>(below(end) & ~below(begin)), x);
  }

  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }

  // As Avx2::exp2; the clamp keeps -inf out of the subtraction, NaN passes (max gives its second).
  template <int kDegree>
  static F exp2(F x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
    const F f = _mm512_sub_ps(x, n);
    F p;
    if constexpr (kDegree == 5) {
      p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.00132764721f), _mm512_set1_ps(0.0096755414f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.0555071327f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.240221197f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.693146967f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(1.00000007f));
    } else {
      static_assert(kDegree == 3, "degree 5 (7.5e-8) or 3 (7.5e-5)");
      p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0551716696f), _mm512_set1_ps(0.242611126f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.693260986f));
      p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.999928073f));
    }
    return _mm512_scalef_ps(p, n);
  }

  // 2^x of numbers that are no larger than 8, to 7.5e-5; 0 of -inf, NaN of NaN.
  static F exp2_below(F x) {
    const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F p = _mm512_fmadd_ps(f, _mm512_set1_ps(kCubic[3]), _mm512_set1_ps(kCubic[2]));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(kCubic[1]));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(kCubic[0]));
    return _mm512_scalef_ps(p, x);
  }

  static F load_bf16(const uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_f16(const uint16_t* p) {
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  static F load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void load_nibbles(const uint8_t* p, F* low, F* high) {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i magic = _mm512_set1_epi32(0x4b000000);
    const F bias = _mm512_set1_ps(8388616.0f);
    const __m512i first = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    *low = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_or_si512(first, magic)), bias);
    *high = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), magic)),
                          bias);
  }
  static void deinterleave(F a, F b, F* out) {
    const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const I odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    out[0] = _mm512_permutex2var_ps(a, even, b);
    out[1] = _mm512_permutex2var_ps(a, odd, b);
  }
  static void store_f16(uint16_t* p, F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(_mm512_castps512_ps256(x), kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                     _mm256_cvtps_ph(_mm512_extractf32x8_ps(x, 1), kNearest));
  }
  static void store_s8(int8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }

  // acc += u8 . s8, 4 products a lane. GCC spills accumulators around the intrinsic, whose first
  // operand it copies; the read-write constraint keeps them in registers.
  static I dot(I acc, I u8, I s8) {
#if defined(JAX_GLUON_EMULATE_AVX512)
    return _mm512_dpbusd_epi32(acc, u8, s8);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
    return acc;
#endif
  }
  static I dot_keys(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_values(I acc, I value, I probability) { return dot(acc, probability, value); }

  static constexpr int kKeyBias = 128, kMaxWeight = 255;
  static I dot_key_bytes(I acc, I key, I query) {
    const I biased = _mm512_xor_si512(key, _mm512_set1_epi32(static_cast<int>(0x80808080)));
#if !defined(JAX_GLUON_EMULATE_AVX512)
    // A query that is read once may stay in memory.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(biased), "vm"(query));
    return acc;
#else
    return dot(acc, biased, query);
#endif
  }
  static I dot_key_nibbles(I acc, I bytes, I even, I odd) {
    I low, high;
    split_nibbles(bytes, &low, &high);
    return dot(dot(acc, low, even), high, odd);
  }
  static I dot_weights(I acc, I weights, I codes) { return dot(acc, weights, codes); }
  static I dot_nibble_weights(I acc, I weights, I codes) { return dot(acc, weights, codes); }
  static void split_nibbles(I bytes, I* low, I* high) {
    const I mask = _mm512_set1_epi32(0x0f0f0f0f);
    *low = _mm512_and_si512(bytes, mask);
    *high = _mm512_and_si512(_mm512_srli_epi32(bytes, 4), mask);
  }
  static void interleave(I x, I y, I z, I w, I* out) {
    const I xy = _mm512_unpacklo_epi8(x, y), zw = _mm512_unpacklo_epi8(z, w);
    const I xy_high = _mm512_unpackhi_epi8(x, y), zw_high = _mm512_unpackhi_epi8(z, w);
    out[0] = _mm512_unpacklo_epi16(xy, zw);
    out[1] = _mm512_unpackhi_epi16(xy, zw);
    out[2] = _mm512_unpacklo_epi16(xy_high, zw_high);
    out[3] = _mm512_unpackhi_epi16(xy_high, zw_high);
  }
  static JAX_GLUON_INLINE I sum_each(const I* x) {
    const auto pairs = [](I a, I b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const auto fours = [&](const I* y) {
      const I ab = pairs(y[0], y[1]), cd = pairs(y[2], y[3]);
      return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    };
    const auto lanes = [](I a, I b) {
      return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return lanes(lanes(fours(x), fours(x + 4)), lanes(fours(x + 8), fours(x + 12)));
  }
  static I permute(I table, I index) { return _mm512_permutexvar_epi32(index, table); }
  static F permute(F table, I index) { return _mm512_permutexvar_ps(index, table); }
  static I add_i32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I xor_i32(I a, I b) { return _mm512_xor_si512(a, b); }
  static void multiply_wide(I x, uint32_t factor, I* low, I* high) {
    const I f = _mm512_set1_epi32(static_cast<int32_t>(factor));
    const I even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
    *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  }
  static void store_kept(uint8_t* p, I x, uint32_t threshold) {
    const I least = _mm512_set1_epi32(static_cast<int32_t>(threshold));
    const I halves[2] = {_mm512_and_si512(x, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(x, 16)};
    for (int half = 0; half < 2; ++half) {
      const __mmask16 kept = _mm512_cmp_epu32_mask(halves[half], least, _MM_CMPINT_NLT);
      uint8_t bytes[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes),
                       _mm512_cvtepi32_epi8(_mm512_maskz_set1_epi32(kept, 1)));
      std::memcpy(p + 8 * half, bytes, 8);
      std::memcpy(p + 64 + 8 * half, bytes + 8, 8);
    }
  }
  static I pack_bytes(I a, I b, I c, I d) {
    const I low = _mm512_or_si512(a, _mm512_slli_epi32(b, 8));
    return _mm512_or_si512(low,
                           _mm512_or_si512(_mm512_slli_epi32(c, 16), _mm512_slli_epi32(d, 24)));
  }
  static void store_u8(uint8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }

  // 4 * kLanes integers in [0, 255], rounded, as bytes in key order.
  static void store_probabilities(void* p, const F* x) {
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(static_cast<__m128i*>(p) + i,
                       _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x[i])));
    }
  }

  // 2 * kLanes bfloat16, rounded, in key order.
  static void store_bf16_pair(uint32_t* p, F low, F high) {
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(p, &both, sizeof both);
  }

  // acc += bf16 . bf16, 2 products a lane.
  static F dot_bf16(F acc, I a, I b) {
#if defined(JAX_GLUON_EMULATE_AVX512)
    return _mm512_dpbf16_ps(acc, reinterpret<__m512bh>(a), reinterpret<__m512bh>(b));
#else
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#endif
  }

  static bool any_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }

  // Two numbers a lane: the first vector's is the low one.
  static I interleave_bf16(F low, F high) {
    const I order =
        _mm512_set_epi32(0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a,
                         0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                         0x00130003, 0x00120002, 0x00110001, 0x00100000);
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    I words;
    std::memcpy(&words, &both, sizeof words);
    return _mm512_permutexvar_epi16(order, words);
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
