// Eight float32 lanes: AVX2, FMA, F16C. The interface that every simd/*.h gives the kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

struct Avx2 {
  static constexpr int kRegisters = 16;
  static constexpr int kLanes = 8;
  // Register tile: 6 rows x 2 vectors = 12 accumulators, 2 operands, 1 broadcast of 16 registers.
  static constexpr int kTileRows = 6, kTileVectors = 2;
  // Lanes of a row that a tile of probabilities loads at once, and vectors of a row's logits that
  // the gluon pipeline keeps in registers.
  static constexpr int kRowLanes = 1, kSubtileVectors = 16;
  // Without VNNI, vpmaddwd on 16-bit pairs: exact for 8-bit codes, where vpmaddubsw would saturate,
  // and no slower (both need one multiply per 16 products). 0: no bfloat16 dot product.
  static constexpr int kInt8Group = 2;
  // By how much keys of tiles are larger, and whether probabilities are read less 128, as signed
  // bytes.
  static constexpr int kTileKeyBias = 0;
  static constexpr bool kShiftsProbabilities = false;

  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static I load_i32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_i32(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  // The first `count` bytes, of [1, 4 * kLanes], then zeros. No other byte is read.
  static I load_bytes(const void* p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i whole = _mm256_cmpgt_epi32(_mm256_set1_epi32(count / 4), lane);
    const I lanes = _mm256_maskload_epi32(static_cast<const int*>(p), whole);
    if (count % 4 == 0) return lanes;
    int32_t last = 0;
    std::memcpy(&last, static_cast<const char*>(p) + count / 4 * 4, static_cast<size_t>(count % 4));
    const I at_last = _mm256_cmpeq_epi32(_mm256_set1_epi32(count / 4), lane);
    return _mm256_blendv_epi8(lanes, _mm256_set1_epi32(last), at_last);
  }
  static I set1_i32(int32_t x) { return _mm256_set1_epi32(x); }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // b where either is NaN.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static I to_int(F x) { return _mm256_cvtps_epi32(x); }

  // a < b ? x : y, false where a or b is NaN.
  static F where_less(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  // p != 0 ? x : 0, true where p is NaN.
  static F where_nonzero(F p, F x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(p, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  }
  // visible[lane] ? x : y
  static F where_visible(const uint8_t* visible, F x, F y) {
    const __m256i wide =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(visible)));
    return _mm256_blendv_ps(y, x,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256())));
  }
  // begin <= lane < end ? x : y
  static F where_between(int begin, int end, F x, F y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i in = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(begin - 1)),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(in));
  }

  static float reduce_add(F x) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
  }
  static float reduce_max(F x) {
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
  }

  // 2^x for x <= 127; exactly 0 below 2^-126, NaN for NaN. Minimax polynomials in the fraction;
  // adding 1.5 * 2^23 rounds x to an integer, and the 127 beside it leaves that integer in the low
  // bits as a biased exponent.
  template <int kDegree>
  static F exp2(F x) {
    const F magic = _mm256_set1_ps(12582912.0f + 127.0f);
    const F shifted = _mm256_add_ps(x, magic);
    const F f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
    F p;
    if constexpr (kDegree == 5) {
      p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.00132764721f), _mm256_set1_ps(0.0096755414f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0.0555071327f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0.240221197f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0.693146967f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(1.00000007f));
    } else {
      static_assert(kDegree == 3, "degree 5 (7.5e-8) or 3 (7.5e-5)");
      p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.0551716696f), _mm256_set1_ps(0.242611126f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0.693260986f));
      p = _mm256_fmadd_ps(f, p, _mm256_set1_ps(0.999928073f));
    }
    const F power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    const F tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, power));
  }

  static F load_bf16(const uint16_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // The codes of kLanes bytes, less their bias of 8: low nibbles, then high ones. As mantissas of
  // 2^23, from which 2^23 + 8 is subtracted.
  static void load_nibbles(const uint8_t* p, F* low, F* high) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i magic = _mm256_set1_epi32(0x4b000000);
    const F bias = _mm256_set1_ps(8388616.0f);
    const __m256i first = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    *low = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(first, magic)), bias);
    *high = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_srli_epi32(bytes, 4), magic)),
                          bias);
  }
  // The elements of a and b at even places, and at odd ones.
  static void deinterleave(F a, F b, F* out) {
    const auto order = [](F x) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
    };
    out[0] = order(_mm256_shuffle_ps(a, b, 0x88));
    out[1] = order(_mm256_shuffle_ps(a, b, 0xdd));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Lanes to int8, values already within [-127, 127].
  static void store_s8(int8_t* p, I x) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  // acc += codes . codes: 2 products of 16-bit numbers a lane, exact. One statement, so that a
  // tile's 12 accumulators, 2 operands, broadcast and product fill the 16 registers and none is
  // spilled.
  static I dot(I acc, I a, I b) {
#if defined(__GNUC__)
    I product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product)
            : "x"(a), "x"(b));
    return acc;
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
  }
  static I dot_keys(I acc, I key, I query) { return dot(acc, key, query); }
  static I dot_values(I acc, I value, I probability) { return dot(acc, value, probability); }

  // Bytes. A query's codes are within [-127, 127], and weights of 8-bit codes within kMaxWeight:
  // sums of two products, 2 * 127 * 128 and 2 * 255 * 15, then fit 16 bits, where vpmaddubsw would
  // saturate.
  static constexpr int kKeyBias = 0, kMaxWeight = 127;
  // acc += key . query, 4 products a lane; keys are larger by kKeyBias.
  static I dot_key_bytes(I acc, I key, I query) {
    return dot_weights(acc, _mm256_abs_epi8(key), _mm256_sign_epi8(query, key));
  }
  // The same of 4-bit codes, all larger by 8: low nibbles with `even`, high ones with `odd`.
  static I dot_key_nibbles(I acc, I bytes, I even, I odd) {
    I low, high;
    split_nibbles(bytes, &low, &high);
    const I pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // acc += weights . codes, unsigned and signed bytes, 4 products a lane.
  static I dot_weights(I acc, I weights, I codes) {
    const I pairs = _mm256_maddubs_epi16(weights, codes);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // The same of codes that are not negative and below 16, where weights may be up to 255.
  static I dot_nibble_weights(I acc, I weights, I codes) {
    return dot_weights(acc, weights, codes);
  }
  static void split_nibbles(I bytes, I* low, I* high) {
    const I mask = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(bytes, mask);
    *high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
  }
  // Bytes of four rows side by side: dword e of 16-byte lane l of out[v] is byte 16 l + 4 v + e of
  // each row.
  static void interleave(I x, I y, I z, I w, I* out) {
    const I xy = _mm256_unpacklo_epi8(x, y), zw = _mm256_unpacklo_epi8(z, w);
    const I xy_high = _mm256_unpackhi_epi8(x, y), zw_high = _mm256_unpackhi_epi8(z, w);
    out[0] = _mm256_unpacklo_epi16(xy, zw);
    out[1] = _mm256_unpackhi_epi16(xy, zw);
    out[2] = _mm256_unpacklo_epi16(xy_high, zw_high);
    out[3] = _mm256_unpackhi_epi16(xy_high, zw_high);
  }
  // Lane i of the result is the sum of the lanes of x[i].
  static JAX_GLUON_INLINE I sum_each(const I* x) {
    const auto pairs = [](I a, I b) {
      return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    };
    const auto fours = [&](const I* y) {
      const I ab = pairs(y[0], y[1]), cd = pairs(y[2], y[3]);
      return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    };
    const I low = fours(x), high = fours(x + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
  }
  // Lane i of the result is lane index[i] of the table.
  static I permute(I table, I index) { return _mm256_permutevar8x32_epi32(table, index); }
  static F permute(F table, I index) { return _mm256_permutevar8x32_ps(table, index); }
  static I add_i32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I xor_i32(I a, I b) { return _mm256_xor_si256(a, b); }
  // The halves of products of unsigned numbers.
  static void multiply_wide(I x, uint32_t factor, I* low, I* high) {
    const I f = _mm256_set1_epi32(static_cast<int32_t>(factor));
    const I even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
    *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
  // Whether 16-bit numbers reach the threshold, as bytes of 0 and 1: of eight lanes the low
  // numbers, then the high ones; the next eight lanes 64 bytes on.
  static void store_kept(uint8_t* p, I x, uint32_t threshold) {
    const I least = _mm256_set1_epi16(static_cast<int16_t>(threshold));
    const I kept = _mm256_cmpeq_epi16(_mm256_max_epu16(x, least), x);
    const I order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, 2, 6, 10, 14, -1, -1, -1, -1, 0,
                                     4, 8, 12, -1, -1, -1, -1, 2, 6, 10, 14, -1, -1, -1, -1);
    const I bytes = _mm256_and_si256(_mm256_shuffle_epi8(kept, order), _mm256_set1_epi8(1));
    const __m128i last = _mm_slli_epi64(_mm256_extracti128_si256(bytes, 1), 32);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_or_si128(_mm256_castsi256_si128(bytes), last));
  }
  // Integers in [0, 255]: those of four vectors as the bytes of a lane, and those of one in a row.
  static I pack_bytes(I a, I b, I c, I d) {
    const I low = _mm256_or_si256(a, _mm256_slli_epi32(b, 8));
    return _mm256_or_si256(low,
                           _mm256_or_si256(_mm256_slli_epi32(c, 16), _mm256_slli_epi32(d, 24)));
  }
  static void store_u8(uint8_t* p, I x) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }

  // 2 * kLanes integers in [0, 255], rounded, as 16-bit numbers in key order.
  static void store_probabilities(void* p, const F* x) {
    const __m256i packed = _mm256_packus_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
