// AMX's tile operations, against what they say of one element.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cpu/simd/amx.h"

#ifndef JAX_GLUON_EMULATE_AVX512
#include "cpu/amx_support.h"
#endif
#include "cpu/simd/convert.h"

namespace jax_gluon::cpu {
namespace {

using Tile = Amx::Tile;
int failures = 0;

void expect(const char* what, double found, double expected, double tolerance = 0.0) {
  if (std::fabs(found - expected) <= tolerance) return;
  if (++failures <= 20) std::printf("%s: %.9g, expected %.9g\n", what, found, expected);
}

uint32_t random_bits() {
  static uint64_t state = 0x9E3779B97F4A7C15ull;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 32);
}
float random_float() { return static_cast<float>(random_bits() >> 8) * 0x1p-23f - 1.0f; }

constexpr int kRows = 16, kStride = 80;  // bytes from row to row: more than a row has

// c += a b of whole tiles, whose rows lie apart.
void test_codes() {
  int8_t a[kRows * kStride], b[kRows * kStride];
  int32_t c[kRows][16], sums[kRows * 16];
  for (int8_t& x : a) x = static_cast<int8_t>(random_bits());
  for (int8_t& x : b) x = static_cast<int8_t>(random_bits());
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 16; ++n) c[m][n] = static_cast<int32_t>(random_bits() >> 8);
  }
  Tile::load<1>(c, 64);
  Tile::load<4>(a, kStride);
  Tile::stream<6>(b, kStride);
  Tile::dot_s8<1, 4, 6>();
  Tile::store<1>(sums, 64);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t expected = c[m][n];
      for (int k = 0; k < 64; ++k) {
        expected += a[m * kStride + k] * b[k / 4 * kStride + 4 * n + k % 4];
      }
      expect("dot_s8", sums[m * 16 + n], expected);
    }
  }
}

void test_bf16() {
  uint16_t a[kRows * kStride / 2], b[kRows * kStride / 2];
  float sums[kRows * 16];
  for (uint16_t& x : a) x = bf16_from_float(random_float());
  for (uint16_t& x : b) x = bf16_from_float(random_float());
  // What is not normal counts as nothing.
  a[0] = 1;
  Tile::zero<3>();
  Tile::stream<5>(a, kStride);
  Tile::load<7>(b, kStride);
  Tile::dot_bf16<3, 5, 7>();
  Tile::store<3>(sums, 64);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 16; ++n) {
      double expected = 0.0;
      for (int k = 0; k < 32; ++k) {
        const double x = m == 0 && k == 0 ? 0.0 : float_from_bf16(a[m * kStride / 2 + k]);
        expected += x * float_from_bf16(b[k / 2 * kStride / 2 + 2 * n + k % 2]);
      }
      expect("dot_bf16", sums[m * 16 + n], expected, 1e-5);
    }
  }
}

void test_words() {
  float low[16], high[16];
  for (float& x : low) x = random_float();
  for (float& x : high) x = random_float();
  low[3] = std::nanf("");
  const auto pair = Amx::interleave_bf16(Amx::load(low), Amx::load(high));
  uint16_t words[32];
  std::memcpy(words, &pair, sizeof words);
  for (int i = 0; i < 16; ++i) {
    if (i == 3) {
      expect("interleave_bf16 of NaN", std::isnan(float_from_bf16(words[2 * i])), 1);
    } else {
      expect("interleave_bf16", words[2 * i], bf16_from_float(low[i]));
    }
    expect("interleave_bf16", words[2 * i + 1], bf16_from_float(high[i]));
  }
  expect("any_less", Amx::any_less(Amx::set1(1.0f), Amx::set1(1.0f)), 0);
  expect("any_less", Amx::any_less(Amx::load(low), Amx::set1(2.0f)), 1);
}

struct alignas(64) Config {
  uint8_t bytes[64];
};

Config configured() {
  Config config;
  Tile::store_config(&config);
  return config;
}

void test_configuration() {
  expect("palette without tiles", configured().bytes[0], 0);
  {
    const Amx::Tiles tiles;
    expect("palette", configured().bytes[0], 1);
  }
  expect("palette after tiles", configured().bytes[0], 0);
  // Somebody else's: three tiles of 8 rows of 32 bytes.
  Config other = {};
  other.bytes[0] = 1;
  for (int t = 0; t < 3; ++t) {
    other.bytes[16 + 2 * t] = 32;
    other.bytes[48 + t] = 8;
  }
  Tile::load_config(&other);
  {
    const Amx::Tiles tiles;
    expect("rows", configured().bytes[48], 16);
  }
  const Config after = configured();
  for (int i = 0; i < 64; ++i) expect("configuration put back", after.bytes[i], other.bytes[i]);
  Tile::release();
}

}  // namespace
}  // namespace jax_gluon::cpu

int main() {
  using namespace jax_gluon::cpu;
#ifndef JAX_GLUON_EMULATE_AVX512
  if (!may_use_amx()) {
    std::printf("no AMX\n");
    return 77;
  }
#endif
  {
    const Amx::Tiles tiles;
    test_codes();
    test_bf16();
  }
  test_words();
  test_configuration();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
