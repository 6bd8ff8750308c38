// Random operands of a SIMD target's operations, and comparisons with what they are to give. TARGET
// is the target's struct; its header comes from the command line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/simd/convert.h"

namespace jax_gluon::cpu {
namespace {

using T = TARGET;
using F = T::F;
using I = T::I;
constexpr int W = T::kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void fail(const char* operation, int lane, double found, double expected) {
  if (++failures <= 20) {
    std::printf("%s, lane %d: %.9g, expected %.9g\n", operation, lane, found, expected);
  }
}

uint32_t random_bits() {
  static uint64_t state = 0x9E3779B97F4A7C15ull;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 32);
}
float random_in(float low, float high) {
  return low + (high - low) * static_cast<float>(random_bits() >> 8) * 0x1p-24f;
}
int random_int(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<uint32_t>(high - low + 1));
}

struct Floats {
  float v[W];
};
struct Ints {
  int32_t v[W];
};
struct Bytes {
  uint8_t v[4 * W];
  int8_t s8(int i) const { return static_cast<int8_t>(v[i]); }
};
static_assert(sizeof(Bytes) == sizeof(Ints));

Floats lanes_of(F x) {
  Floats out;
  T::store(out.v, x);
  return out;
}
Ints lanes_of(I x) {
  Ints out;
  T::store_i32(out.v, x);
  return out;
}
Bytes bytes_of(I x) {
  Bytes out;
  T::store_i32(out.v, x);
  return out;
}
F vector_of(const Floats& x) { return T::load(x.v); }
I vector_of(const Ints& x) { return T::load_i32(x.v); }
I vector_of(const Bytes& x) { return T::load_i32(x.v); }

// Any number that a float can be, and those where arithmetic turns, in all lanes.
Floats random_floats() {
  static const float edges[] = {
      0.0f,     -0.0f,    1.0f,       -1.0f,      0.5f,         1e-45f,   -1e-45f,  1.17549435e-38f,
      3.4e38f,  -3.4e38f, kInfinity,  -kInfinity, kNaN,         65504.0f, 65520.0f, 65519.99f,
      0x1p-24f, 0x1p-25f, 0x1.8p-24f, 0x1p-14f,   0x1.ffcp-15f, 2.5f,     3.5f,     -2.5f};
  Floats x;
  for (float& each : x.v) {
    switch (random_bits() % 4) {
      case 0:
        each = edges[random_bits() % (sizeof edges / sizeof *edges)];
        break;
      case 1:
        each = float_from_bits(random_bits());
        break;
      default:
        each = random_in(-4.0f, 4.0f);
    }
  }
  return x;
}
Floats floats_in(float low, float high) {
  Floats x;
  for (float& each : x.v) each = random_in(low, high);
  return x;
}
Bytes bytes_in(int low, int high) {
  Bytes x;
  for (uint8_t& each : x.v) each = static_cast<uint8_t>(random_int(low, high));
  return x;
}
Ints random_ints() {
  Ints x;
  for (int32_t& each : x.v) each = random_int(-1000000, 1000000);
  return x;
}

// The same bits, or both NaN.
bool is_same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

template <class Expected>
void check(const char* operation, F found, Expected expected) {
  const Floats x = lanes_of(found);
  for (int i = 0; i < W; ++i) {
    if (const float y = expected(i); !is_same(x.v[i], y)) {
      fail(operation, i, static_cast<double>(x.v[i]), static_cast<double>(y));
    }
  }
}
template <class Expected>
void check(const char* operation, I found, Expected expected) {
  const Ints x = lanes_of(found);
  for (int i = 0; i < W; ++i) {
    if (const int32_t y = expected(i); x.v[i] != y) fail(operation, i, x.v[i], y);
  }
}
template <class Element, class Expected>
void check_stored(const char* operation, const Element* found, int count, Expected expected) {
  for (int i = 0; i < count; ++i) {
    const auto y = static_cast<Element>(expected(i));
    if (found[i] != y) fail(operation, i, static_cast<double>(found[i]), static_cast<double>(y));
  }
}

// acc + the sum of product(byte) over the four bytes of a lane.
template <class Product>
auto dots(const Ints& acc, Product product) {
  return [=](int i) {
    int32_t total = acc.v[i];
    for (int e = 4 * i; e < 4 * i + 4; ++e) total += product(e);
    return total;
  };
}

}  // namespace
}  // namespace jax_gluon::cpu
