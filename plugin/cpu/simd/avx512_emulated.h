// The intrinsics that avx512.h uses, as plain loops over lanes: what Intel's guide says each
// does. With them the AVX-512 kernels run, slowly, where the processor has no AVX-512, so that
// every test can reach their packing, tiles and tails.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/simd/convert.h"

namespace jax_gluon::cpu {
namespace {

struct __m512 {
  float v[16];
};
struct __m512i {
  int32_t v[16];
};
struct __m256 {
  float v[8];
};
struct __m256i {
  uint16_t v[16];
};
struct __m128i {
  uint8_t v[16];
};
struct __m512bh {
  uint16_t v[32];
};
using __mmask16 = uint16_t;

enum { _CMP_LT_OQ = 0x11, _CMP_NEQ_UQ = 0x04 };
enum { _MM_CMPINT_NLT = 5 };
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_TO_NEG_INF = 1, _MM_FROUND_NO_EXC = 8 };

template <class Out, class In>
Out reinterpret(const In& x) {
  static_assert(sizeof(Out) == sizeof(In));
  Out y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
template <class Out>
Out load_bytes(const void* p) {
  Out x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class Fn>
__m512 float_lanes(Fn fn) {
  __m512 y;
  for (int i = 0; i < 16; ++i) y.v[i] = fn(i);
  return y;
}
template <class Fn>
__m512i int_lanes(Fn fn) {
  __m512i y;
  for (int i = 0; i < 16; ++i) y.v[i] = static_cast<int32_t>(fn(i));
  return y;
}
template <class Fn>
__mmask16 mask_lanes(Fn fn) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (fn(i) ? 1u : 0u) << i;
  return static_cast<__mmask16>(mask);
}

inline __m512 _mm512_loadu_ps(const void* p) { return load_bytes<__m512>(p); }
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline __m512i _mm512_loadu_si512(const void* p) { return load_bytes<__m512i>(p); }
inline __m512i _mm512_maskz_loadu_epi8(uint64_t mask, const void* p) {
  uint8_t bytes[64] = {};
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) bytes[i] = static_cast<const uint8_t*>(p)[i];
  }
  return load_bytes<__m512i>(bytes);
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
inline __m128i _mm_loadu_si128(const __m128i* p) { return load_bytes<__m128i>(p); }
inline void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(p, &x, sizeof x); }
inline __m256i _mm256_loadu_si256(const __m256i* p) { return load_bytes<__m256i>(p); }

inline __m512 _mm512_set1_ps(float x) {
  return float_lanes([=](int) { return x; });
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_set1_epi32(int32_t x) {
  return int_lanes([=](int) { return x; });
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return float_lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return float_lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return float_lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
  return float_lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return float_lanes([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// The second operand where either is NaN.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return float_lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline __m512 _mm512_abs_ps(__m512 x) {
  return float_lanes([&](int i) { return std::fabs(x.v[i]); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  return float_lanes([&](int i) { return static_cast<float>(x.v[i]); });
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {
  return int_lanes([&](int i) {
    const float y = std::nearbyint(x.v[i]);
    return y >= -2147483648.0f && y < 2147483648.0f ? static_cast<int32_t>(y) : INT32_MIN;
  });
}
inline __m512 _mm512_roundscale_ps(__m512 x, int) {
  return float_lanes([&](int i) { return std::nearbyint(x.v[i]); });
}
// x - floor(x): the only mode that is used.
inline __m512 _mm512_reduce_ps(__m512 x, int) {
  return float_lanes(
      [&](int i) { return std::isinf(x.v[i]) ? 0.0f : x.v[i] - std::floor(x.v[i]); });
}
// x * 2^floor(n).
inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  return float_lanes([&](int i) {
    if (std::isnan(x.v[i]) || std::isnan(n.v[i])) return std::nanf("");
    const float power = std::fmin(std::fmax(std::floor(n.v[i]), -400.0f), 400.0f);
    return std::ldexp(x.v[i], static_cast<int>(power));
  });
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return mask_lanes(
      [&](int i) { return predicate == _CMP_LT_OQ ? a.v[i] < b.v[i] : !(a.v[i] == b.v[i]); });
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  return mask_lanes([&](int i) { return (a.v[i] & b.v[i]) != 0; });
}
inline __m512 _mm512_mask_mov_ps(__m512 y, __mmask16 mask, __m512 x) {
  return float_lanes([&](int i) { return mask >> i & 1 ? x.v[i] : y.v[i]; });
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), mask, x);
}
// Halves are folded onto each other, as the compilers' sequence does.
inline float _mm512_reduce_add_ps(__m512 x) {
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  }
  return x.v[0];
}
inline float _mm512_reduce_max_ps(__m512 x) {
  float m = x.v[0];
  for (int i = 1; i < 16; ++i) m = m > x.v[i] ? m : x.v[i];
  return m;
}

inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return int_lanes([&](int i) { return x.v[i]; });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return int_lanes([&](int i) { return static_cast<int8_t>(x.v[i]); });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return int_lanes([&](int i) { return x.v[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i x, int n) {
  return int_lanes([&](int i) { return static_cast<uint32_t>(x.v[i]) << n; });
}
inline __m512i _mm512_srli_epi32(__m512i x, int n) {
  return int_lanes([&](int i) { return static_cast<uint32_t>(x.v[i]) >> n; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return a.v[i] & b.v[i]; });
}
template <class... T>
__m512i _mm512_setr_epi32(T... lane) {
  const int32_t lanes[] = {lane...};
  return int_lanes([&](int i) { return lanes[i]; });
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return float_lanes([&](int i) {
    const int at = index.v[i] & 31;
    return at < 16 ? a.v[at] : b.v[at - 16];
  });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return a.v[i] | b.v[i]; });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return a.v[i] ^ b.v[i]; });
}
// The even lanes' products, each in two lanes.
inline __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  return int_lanes([&](int i) {
    const int even = i / 2 * 2;
    const uint64_t product =
        uint64_t{static_cast<uint32_t>(a.v[even])} * static_cast<uint32_t>(b.v[even]);
    return static_cast<uint32_t>(i % 2 == 0 ? product : product >> 32);
  });
}
// Only by whole lanes.
inline __m512i _mm512_slli_epi64(__m512i x, int) {
  return int_lanes([&](int i) { return i % 2 == 0 ? 0 : x.v[i - 1]; });
}
inline __m512i _mm512_srli_epi64(__m512i x, int) {
  return int_lanes([&](int i) { return i % 2 == 0 ? x.v[i + 1] : 0; });
}
inline __m512i _mm512_mask_mov_epi32(__m512i x, __mmask16 mask, __m512i y) {
  return int_lanes([&](int i) { return mask >> i & 1 ? y.v[i] : x.v[i]; });
}
inline __m512i _mm512_maskz_set1_epi32(__mmask16 mask, int32_t x) {
  return int_lanes([&](int i) { return mask >> i & 1 ? x : 0; });
}
inline __mmask16 _mm512_cmp_epu32_mask(__m512i a, __m512i b, int /*not less*/) {
  return mask_lanes(
      [&](int i) { return static_cast<uint32_t>(a.v[i]) >= static_cast<uint32_t>(b.v[i]); });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return int_lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i x) {
  return int_lanes([&](int i) { return x.v[index.v[i] & 15]; });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 x) {
  return float_lanes([&](int i) { return x.v[index.v[i] & 15]; });
}
// The elements of the low or high halves of each 16-byte lane of a and b in turn.
template <class T, bool kHigh>
__m512i unpack(__m512i a, __m512i b) {
  constexpr size_t kCount = 64 / sizeof(T), kLane = 16 / sizeof(T);
  const auto x = reinterpret<std::array<T, kCount>>(a), y = reinterpret<std::array<T, kCount>>(b);
  std::array<T, kCount> out;
  for (size_t i = 0; i < kCount; ++i) {
    const size_t from = i / kLane * kLane + (kHigh ? kLane / 2 : 0) + i % kLane / 2;
    out[i] = i % 2 == 0 ? x[from] : y[from];
  }
  return reinterpret<__m512i>(out);
}
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpack<uint8_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpack<uint8_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpack<uint16_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpack<uint16_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpack<uint32_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpack<uint32_t, true>(a, b); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpack<uint64_t, false>(a, b); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpack<uint64_t, true>(a, b); }
// 16-byte lanes of a, then of b, as the pairs of bits of `order` choose them.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  return int_lanes([&](int i) {
    const int lane = order >> i / 4 * 2 & 3;
    return (i < 8 ? a : b).v[lane * 4 + i % 4];
  });
}
inline __m512 _mm512_castsi512_ps(__m512i x) { return reinterpret<__m512>(x); }
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  __m128i y;
  for (int i = 0; i < 16; ++i) y.v[i] = static_cast<uint8_t>(x.v[i]);
  return y;
}
inline __m128i _mm512_cvtusepi32_epi8(__m512i x) {
  __m128i y;
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = static_cast<uint32_t>(x.v[i]);
    y.v[i] = static_cast<uint8_t>(u > 255 ? 255 : u);
  }
  return y;
}

inline __m256 _mm256_cvtph_ps(__m128i x) {
  uint16_t h[8];
  std::memcpy(h, &x, sizeof h);
  __m256 y;
  for (int i = 0; i < 8; ++i) y.v[i] = float_from_f16(h[i]);
  return y;
}
inline __m128i _mm256_cvtps_ph(__m256 x, int) {
  uint16_t h[8];
  for (int i = 0; i < 8; ++i) h[i] = f16_from_float(x.v[i]);
  return load_bytes<__m128i>(h);
}
inline __m512 _mm512_castps256_ps512(__m256 x) {
  return float_lanes([&](int i) { return i < 8 ? x.v[i] : 0.0f; });
}
inline __m256 _mm512_castps512_ps256(__m512 x) { return load_bytes<__m256>(&x); }
inline __m512 _mm512_insertf32x8(__m512 x, __m256 y, int) {
  std::memcpy(x.v + 8, &y, sizeof y);
  return x;
}
inline __m256 _mm512_extractf32x8_ps(__m512 x, int) { return load_bytes<__m256>(x.v + 8); }

inline __m512i _mm512_dpbusd_epi32(__m512i acc, __m512i u8, __m512i s8) {
  const auto a = reinterpret<std::array<uint8_t, 64>>(u8);
  const auto b = reinterpret<std::array<int8_t, 64>>(s8);
  for (size_t i = 0; i < 64; ++i) acc.v[i / 4] += a[i] * b[i];
  return acc;
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  __m512bh y;
  for (int i = 0; i < 16; ++i) {
    y.v[i] = bf16_from_float(low.v[i]);
    y.v[16 + i] = bf16_from_float(high.v[i]);
  }
  return y;
}
inline __m512 _mm512_dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    acc.v[i] += float_from_bf16(a.v[2 * i + 1]) * float_from_bf16(b.v[2 * i + 1]);
    acc.v[i] += float_from_bf16(a.v[2 * i]) * float_from_bf16(b.v[2 * i]);
  }
  return acc;
}

inline std::array<uint16_t, 32> words_of(__m512i x) {
  return reinterpret<std::array<uint16_t, 32>>(x);
}

template <class... T>
__m512i _mm512_set_epi32(T... lane) {
  const int32_t lanes[] = {lane...};
  return int_lanes([&](int i) { return lanes[15 - i]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
  const auto at = words_of(index), from = words_of(table);
  std::array<uint16_t, 32> y;
  for (size_t i = 0; i < y.size(); ++i) y[i] = from[at[i] & 31];
  return reinterpret<__m512i>(y);
}

}  // namespace
}  // namespace jax_gluon::cpu
