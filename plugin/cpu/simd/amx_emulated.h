// The instructions that amx.h uses beside those of avx512_emulated.h, as plain loops: what Intel's
// guide says each does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd/avx512_emulated.h"

namespace jax_gluon::cpu {
namespace {

// The tiles of a thread. What is used before it was configured or made is not a number.
struct TileRegisters {
  static constexpr int kRows = 16, kRowBytes = 64;

  static void store_config(void* config) { std::memcpy(config, state().config, 64); }
  static void load_config(const void* config) {
    std::memcpy(state().config, config, 64);
    std::memset(state().tile, 0xff, sizeof state().tile);
  }
  static void release() {
    std::memset(state().config, 0, 64);
    std::memset(state().tile, 0xff, sizeof state().tile);
  }

  template <int kTile>
  static void zero() {
    std::memset(state().tile[kTile], is_whole(kTile) ? 0 : 0xff, kRows * kRowBytes);
  }
  template <int kTile>
  static void load(const void* p, int64_t stride) {
    for (int r = 0; r < kRows; ++r) {
      if (!is_whole(kTile)) continue;
      std::memcpy(state().tile[kTile][r], static_cast<const char*>(p) + r * stride, kRowBytes);
    }
  }
  template <int kTile>
  static void stream(const void* p, int64_t stride) {
    load<kTile>(p, stride);
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(static_cast<char*>(p) + r * stride, state().tile[kTile][r], kRowBytes);
    }
  }
  template <int c, int a, int b>
  static void dot_s8() {
    const auto left = elements<int8_t>(a), right = elements<int8_t>(b);
    auto sums = elements<int32_t>(c);
    for (int m = 0; m < kRows; ++m) {
      for (int k = 0; k < kRowBytes; ++k) {
        for (int n = 0; n < 16; ++n) {
          sums[m * 16 + n] += left[m * 64 + k] * right[k / 4 * 64 + 4 * n + k % 4];
        }
      }
    }
    std::memcpy(state().tile[c], sums.data(), sizeof state().tile[c]);
  }
  // Even and odd products are summed apart; numbers that are not normal count as 0.
  template <int c, int a, int b>
  static void dot_bf16() {
    const auto left = elements<uint16_t>(a), right = elements<uint16_t>(b);
    auto sums = elements<float>(c);
    for (int m = 0; m < kRows; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const float x = normal(float_from_bf16(left[m * 32 + 2 * k]));
        const float y = normal(float_from_bf16(left[m * 32 + 2 * k + 1]));
        for (int n = 0; n < 16; ++n) {
          const uint16_t* pair = right.data() + k * 32 + 2 * n;
          even[n] = normal(std::fma(x, normal(float_from_bf16(pair[0])), even[n]));
          odd[n] = normal(std::fma(y, normal(float_from_bf16(pair[1])), odd[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        float& sum = sums[m * 16 + n];
        sum = normal(normal(sum) + normal(even[n] + odd[n]));
      }
    }
    std::memcpy(state().tile[c], sums.data(), sizeof state().tile[c]);
  }

 private:
  struct State {
    uint8_t config[64] = {};
    uint8_t tile[8][kRows][kRowBytes] = {};
  };
  static State& state() {
    static thread_local State state;
    return state;
  }
  static bool is_whole(int tile) {
    const uint8_t* config = state().config;
    return config[0] == 1 && config[16 + 2 * tile] == kRowBytes && config[48 + tile] == kRows;
  }
  template <class Element>
  static std::array<Element, kRows * kRowBytes / sizeof(Element)> elements(int tile) {
    std::array<Element, kRows * kRowBytes / sizeof(Element)> x;
    std::memcpy(x.data(), state().tile[tile], sizeof x);
    return x;
  }
  static float normal(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f : x;
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
