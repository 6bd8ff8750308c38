// What targets have that multiply by a lane of a register (kRowLanes), or by blocks.
#pragma once

#include "checks.h"

namespace jax_gluon::cpu {
namespace {

// Products with a lane of a row.
template <class T, int kLane>
void test_lane(bool largest) {
  const Floats a = floats_in(-4.0f, 4.0f), b = floats_in(-4.0f, 4.0f), c = floats_in(-4.0f, 4.0f);
  const Floats sums =
      lanes_of(T::template fma_lane<kLane>(vector_of(a), vector_of(b), T::load_row(c.v)));
  for (int i = 0; i < W; ++i) {
    const float expected = std::fma(b.v[i], c.v[kLane], a.v[i]);
    if (sums.v[i] != expected) {
      fail("fma_lane", i, static_cast<double>(sums.v[i]), static_cast<double>(expected));
    }
  }
  const Ints acc = random_ints();
  const I sum = vector_of(acc);
  if constexpr (T::kInt8Group == 4) {
    const Bytes key = largest ? bytes_in(-128, -128) : bytes_in(-128, 127);
    const Bytes query = largest ? bytes_in(-127, -127) : bytes_in(-127, 127);
    const Bytes weights = largest ? bytes_in(255, 255) : bytes_in(0, 255);
    const auto at = [](int e) { return 4 * kLane + e % 4; };
    check("dot_keys_lane",
          T::template dot_keys_lane<kLane>(sum, vector_of(key), T::load_row(query.v)),
          dots(acc, [&](int e) { return key.s8(e) * query.s8(at(e)); }));
    if constexpr (T::kShiftsProbabilities) {
      const I shifted =
          T::template dot_values_lane<kLane>(sum, vector_of(key), T::load_shifted_row(weights.v));
      const I shift = T::add_shift(T::set1_i32(0), vector_of(key));
      check("dot_values_lane", T::without_shift(shifted, shift),
            dots(acc, [&](int e) { return key.s8(e) * weights.v[at(e)]; }));
    }
  } else {
    int16_t a[2 * W], b[2 * W];
    for (int i = 0; i < 2 * W; ++i) {
      a[i] = static_cast<int16_t>(largest ? -128 : random_int(-128, 255));
      b[i] = static_cast<int16_t>(largest ? 255 : random_int(-128, 255));
    }
    const auto expected = [&](int i) {
      return acc.v[i] + a[2 * i] * b[2 * kLane] + a[2 * i + 1] * b[2 * kLane + 1];
    };
    check("dot_keys_lane", T::template dot_keys_lane<kLane>(sum, T::load_i32(a), T::load_row(b)),
          expected);
    check("dot_values_lane",
          T::template dot_values_lane<kLane>(sum, T::load_i32(a), T::load_row(b)), expected);
  }
}

// Products of two rows with two columns, and what makes rows of them.
template <class T>
void test_blocks(bool largest) {
  const auto row_of = [](const void* p) { return T::load_row(p); };
  const Bytes x = largest ? bytes_in(-128, -128) : bytes_in(-128, 127);
  const Bytes y = largest ? bytes_in(-127, -127) : bytes_in(-127, 127), p = bytes_in(0, 255);
  const Ints acc = random_ints();
  const auto block = [](typename T::Row found) { return T::ints_of(found, found); };
  const auto expected = [&](auto product) {
    return [&, product](int i) {
      int32_t total = acc.v[i % 4];
      for (int e = 0; e < 8; ++e) total += product(i % 4 / 2 * 8 + e, i % 2 * 8 + e);
      return total;
    };
  };
  check("multiply_codes", block(T::multiply_codes(row_of(acc.v), row_of(x.v), row_of(y.v))),
        expected([&](int a, int b) { return x.s8(a) * y.s8(b); }));
  check("multiply_probabilities",
        block(T::multiply_probabilities(row_of(acc.v), row_of(p.v), row_of(y.v))),
        expected([&](int a, int b) { return p.v[a] * y.s8(b); }));
  uint16_t u[8], v[8];
  for (int i = 0; i < 8; ++i) {
    u[i] = bf16_from_float(random_in(-4.0f, 4.0f));
    v[i] = bf16_from_float(random_in(-4.0f, 4.0f));
  }
  const Floats start = floats_in(-4.0f, 4.0f);
  const typename T::Row sums = T::multiply_bf16(row_of(start.v), row_of(u), row_of(v));
  const Floats found = lanes_of(T::floats_of(sums, sums));
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(start.v[i]);
    for (int e = 0; e < 4; ++e) {
      sum += static_cast<double>(float_from_bf16(u[i / 2 * 4 + e])) *
             static_cast<double>(float_from_bf16(v[i % 2 * 4 + e]));
    }
    const double each = static_cast<double>(found.v[i]);
    if (std::fabs(each - sum) > 1e-5) fail("multiply_bf16", i, each, sum);
  }
  check("zero_row", block(T::zero_row()), [](int) { return 0; });
  typename T::Row halves[2];
  T::zip_halves(row_of(acc.v), row_of(acc.v + 4), halves);
  check("zip_halves", T::ints_of(halves[0], halves[1]),
        [&](int i) { return acc.v[i / 2 % 2 * 4 + i / 4 * 2 + i % 2]; });
  Ints copy;
  T::store_row(copy.v, row_of(acc.v + 4));
  check_stored("store_row", copy.v, 4, [&](int i) { return acc.v[4 + i]; });
  Floats a = floats_in(-4.0f, 4.0f);
  a.v[0] = float_from_bits(0x3f808000u);  // halfway, to even
  a.v[1] = float_from_bits(0x3f818000u);
  a.v[2] = kInfinity;
  a.v[3] = 3.4e38f;
  uint16_t stored[W];
  T::store_bf16(stored, vector_of(a));
  check_stored("store_bf16", stored, W, [&](int i) { return bf16_from_float(a.v[i]); });
}

}  // namespace
}  // namespace jax_gluon::cpu
