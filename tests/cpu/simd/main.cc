// Every operation that the kernels have of a SIMD target, against what it says of one lane. TARGET
// is the target's struct; its header comes from the command line.
#include "checks.h"
#include "rows_and_blocks.h"

namespace jax_gluon::cpu {
namespace {

void test_arithmetic() {
  const Floats a = random_floats(), b = random_floats(), c = random_floats();
  const F x = vector_of(a), y = vector_of(b), z = vector_of(c);
  check("load", x, [&](int i) { return a.v[i]; });
  check("set1", T::set1(a.v[0]), [&](int) { return a.v[0]; });
  check("zero", T::zero(), [](int) { return 0.0f; });
  check("set1_i32", T::set1_i32(-7), [](int) { return -7; });
  check("add", T::add(x, y), [&](int i) { return a.v[i] + b.v[i]; });
  check("sub", T::sub(x, y), [&](int i) { return a.v[i] - b.v[i]; });
  check("mul", T::mul(x, y), [&](int i) { return a.v[i] * b.v[i]; });
  check("div", T::div(x, y), [&](int i) { return a.v[i] / b.v[i]; });
  // Fused or not.
  const Floats fused = lanes_of(T::fma(x, y, z));
  for (int i = 0; i < W; ++i) {
    const float once = std::fma(a.v[i], b.v[i], c.v[i]);
    volatile float product = a.v[i] * b.v[i];
    if (!is_same(fused.v[i], once) && !is_same(fused.v[i], product + c.v[i])) {
      fail("fma", i, static_cast<double>(fused.v[i]), static_cast<double>(once));
    }
  }
  check("max", T::max(x, y), [&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  check("abs", T::abs(x), [&](int i) { return std::fabs(a.v[i]); });
  check("where_less", T::where_less(x, y, z, x),
        [&](int i) { return a.v[i] < b.v[i] ? c.v[i] : a.v[i]; });
  Floats p = a;
  for (int i = 0; i < W; i += 3) p.v[i] = i % 2 ? 0.0f : -0.0f;
  check("where_nonzero", T::where_nonzero(vector_of(p), y),
        [&](int i) { return p.v[i] != 0.0f ? b.v[i] : 0.0f; });
  uint8_t visible[W];
  for (uint8_t& each : visible) each = random_bits() % 2;
  check("where_visible", T::where_visible(visible, x, y),
        [&](int i) { return visible[i] ? a.v[i] : b.v[i]; });
  const int begin = random_int(-1, W + 1), end = random_int(-1, W + 1);
  check("where_between", T::where_between(begin, end, x, y),
        [&](int i) { return i >= begin && i < end ? a.v[i] : b.v[i]; });
}

void test_random_bits() {
  Ints a, b;
  for (Ints* x : {&a, &b}) {
    for (int32_t& each : x->v) each = static_cast<int32_t>(random_bits());
  }
  check("xor_i32", T::xor_i32(vector_of(a), vector_of(b)), [&](int i) { return a.v[i] ^ b.v[i]; });
  const uint32_t factor = random_bits() * 2 + 1;
  I low, high;
  T::multiply_wide(vector_of(a), factor, &low, &high);
  const auto product = [&](int i) { return uint64_t{static_cast<uint32_t>(a.v[i])} * factor; };
  check("multiply_wide", low, [&](int i) { return static_cast<int32_t>(product(i) & 0xffffffff); });
  check("multiply_wide", high, [&](int i) { return static_cast<int32_t>(product(i) >> 32); });
  const uint32_t threshold = random_bits() % 0x10000;
  uint8_t kept[W / 8 * 64 + 64];
  T::store_kept(kept, vector_of(a), threshold);
  for (int i = 0; i < W; ++i) {
    const uint32_t both = static_cast<uint32_t>(a.v[i]);
    const uint8_t* at = kept + i / 8 * 64 + i % 8;
    check_stored("store_kept", at, 1, [&](int) { return (both & 0xffff) >= threshold; });
    check_stored("store_kept", at + 8, 1, [&](int) { return both >> 16 >= threshold; });
  }
}

void test_rounding() {
  const Ints a = random_ints();
  check("to_float", T::to_float(vector_of(a)), [&](int i) { return static_cast<float>(a.v[i]); });
  Floats x = floats_in(-4.0e6f, 4.0e6f);
  for (int i = 0; i < W; i += 2) x.v[i] = std::floor(x.v[i] / 1e4f) + 0.5f;
  check("to_int", T::to_int(vector_of(x)),
        [&](int i) { return static_cast<int32_t>(std::nearbyint(x.v[i])); });
}

void test_reductions() {
  Floats a = floats_in(-4.0f, 4.0f);
  double sum = 0.0;
  float largest = a.v[0];
  for (float each : a.v) {
    sum += static_cast<double>(each);
    largest = std::fmax(largest, each);
  }
  const double found = static_cast<double>(T::reduce_add(vector_of(a)));
  if (std::fabs(found - sum) > 1e-5) fail("reduce_add", 0, found, sum);
  if (T::reduce_max(vector_of(a)) != largest)
    fail("reduce_max", 0, found, static_cast<double>(largest));
  for (float& each : a.v) each = -kInfinity;
  if (T::reduce_max(vector_of(a)) != -kInfinity) fail("reduce_max of -inf", 0, 0.0, 0.0);
  a.v[random_int(0, W - 1)] = kNaN;
  if (const float x = T::reduce_add(vector_of(a)); x == x) fail("reduce_add of NaN", 0, 0.0, 0.0);
}

template <int kDegree>
void test_exp2(double bar) {
  Floats a = floats_in(-126.0f, 127.0f);
  a.v[0] = random_in(-1.0f, 0.0f);
  const Floats y = lanes_of(T::exp2<kDegree>(vector_of(a)));
  for (int i = 0; i < W; ++i) {
    const double expected = std::exp2(static_cast<double>(a.v[i]));
    const double found = static_cast<double>(y.v[i]);
    if (!(std::fabs(found - expected) <= bar * expected)) fail("exp2", i, found, expected);
  }
  // Below the normal numbers: 0, or as little.
  Floats low = floats_in(-1e9f, -126.01f);
  low.v[0] = -kInfinity;
  low.v[1] = -3.4e38f;
  low.v[2] = random_in(-150.0f, -127.0f);
  const Floats none = lanes_of(T::exp2<kDegree>(vector_of(low)));
  for (int i = 0; i < W; ++i) {
    if (!(none.v[i] >= 0.0f && none.v[i] < 0x1p-126f)) {
      fail("exp2 of little", i, static_cast<double>(none.v[i]), 0.0);
    }
    if (low.v[i] < -200.0f && none.v[i] != 0.0f) {
      fail("exp2 of least", i, static_cast<double>(none.v[i]), 0.0);
    }
  }
  if (const float x = lanes_of(T::exp2<kDegree>(T::set1(kNaN))).v[0]; x == x) {
    fail("exp2 of NaN", 0, static_cast<double>(x), 0.0);
  }
}

// Every number of 16 and of 8 bits.
void test_loads() {
  for (int first = 0; first < 65536; first += W) {
    uint16_t halves[W];
    for (int i = 0; i < W; ++i) halves[i] = static_cast<uint16_t>(first + i);
    check("load_bf16", T::load_bf16(halves), [&](int i) { return float_from_bf16(halves[i]); });
    check("load_f16", T::load_f16(halves), [&](int i) { return float_from_f16(halves[i]); });
  }
  for (int first = 0; first < 256; first += W) {
    uint8_t bytes[W];
    for (int i = 0; i < W; ++i) bytes[i] = static_cast<uint8_t>(first + i);
    check("load_s8", T::load_s8(reinterpret_cast<const int8_t*>(bytes)),
          [&](int i) { return static_cast<float>(static_cast<int8_t>(bytes[i])); });
    F low, high;
    T::load_nibbles(bytes, &low, &high);
    check("load_nibbles", low, [&](int i) { return static_cast<float>((bytes[i] & 15) - 8); });
    check("load_nibbles", high, [&](int i) { return static_cast<float>((bytes[i] >> 4) - 8); });
  }
}

void test_stores() {
  const Floats a = random_floats();
  uint16_t halves[W];
  T::store_f16(halves, vector_of(a));
  for (int i = 0; i < W; ++i) {
    const uint16_t y = f16_from_float(a.v[i]);
    const bool is_nan = a.v[i] != a.v[i] && (halves[i] & 0x7fff) > 0x7c00;
    if (halves[i] != y && !is_nan) fail("store_f16", i, halves[i], y);
  }
  Ints x;
  for (int32_t& each : x.v) each = random_int(-128, 127);
  int8_t codes[W];
  T::store_s8(codes, vector_of(x));
  check_stored("store_s8", codes, W, [&](int i) { return x.v[i]; });
  for (int32_t& each : x.v) each = random_int(0, 255);
  uint8_t bytes[W];
  T::store_u8(bytes, vector_of(x));
  check_stored("store_u8", bytes, W, [&](int i) { return x.v[i]; });

  // Rounded, in the order of keys: as bytes, or as 16-bit numbers.
  constexpr int kVectors = T::kInt8Group == 4 ? 4 : 2;
  Floats p[kVectors];
  F vectors[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    p[v] = floats_in(0.0f, 255.0f);
    p[v].v[v] = 2.5f;
    p[v].v[v + 1] = 254.5f;
    vectors[v] = vector_of(p[v]);
  }
  const auto rounded = [&](int i) { return std::nearbyint(p[i / W].v[i % W]); };
  alignas(64) char stored[4 * W];
  T::store_probabilities(stored, vectors);
  if constexpr (T::kInt8Group == 4) {
    check_stored("store_probabilities", reinterpret_cast<uint8_t*>(stored), 4 * W, rounded);
  } else {
    uint16_t numbers[2 * W];
    std::memcpy(numbers, stored, sizeof numbers);
    check_stored("store_probabilities", numbers, 2 * W, rounded);
  }
}

void test_orders() {
  const Floats a = random_floats(), b = random_floats();
  F parts[2];
  T::deinterleave(vector_of(a), vector_of(b), parts);
  const auto both = [&](int i) { return i < W ? a.v[i] : b.v[i - W]; };
  check("deinterleave", parts[0], [&](int i) { return both(2 * i); });
  check("deinterleave", parts[1], [&](int i) { return both(2 * i + 1); });
  // In place.
  parts[0] = vector_of(a);
  T::deinterleave(parts[0], vector_of(b), parts);
  check("deinterleave", parts[1], [&](int i) { return both(2 * i + 1); });

  Bytes rows[4];
  for (Bytes& row : rows) row = bytes_in(0, 255);
  for (int count = 1; count <= 4 * W; ++count) {
    // From the heap, whose sanitizers and checkers see a byte that is read beyond.
    const std::vector<uint8_t> part(rows[0].v, rows[0].v + count);
    const Bytes found = bytes_of(T::load_bytes(part.data(), count));
    check_stored("load_bytes", found.v, 4 * W,
                 [&](int i) { return i < count ? rows[0].v[i] : uint8_t{0}; });
  }
  I mixed[4];
  T::interleave(vector_of(rows[0]), vector_of(rows[1]), vector_of(rows[2]), vector_of(rows[3]),
                mixed);
  for (int v = 0; v < 4; ++v) {
    const Bytes found = bytes_of(mixed[v]);
    check_stored("interleave", found.v, 4 * W, [&](int i) {
      const int lane = i / 4;
      return rows[i % 4].v[lane / 4 * 16 + 4 * v + lane % 4];
    });
  }
  Ints table = random_ints(), index;
  for (int32_t& each : index.v) each = random_int(0, W - 1);
  check("permute", T::permute(vector_of(table), vector_of(index)),
        [&](int i) { return table.v[index.v[i]]; });
  check("permute", T::permute(vector_of(a), vector_of(index)),
        [&](int i) { return a.v[index.v[i]]; });
  Ints each[W];
  I vectors[W];
  for (int i = 0; i < W; ++i) {
    each[i] = random_ints();
    vectors[i] = vector_of(each[i]);
  }
  check("sum_each", T::sum_each(vectors), [&](int i) {
    int32_t sum = 0;
    for (int32_t lane : each[i].v) sum += lane;
    return sum;
  });
}

void test_integers() {
  const Ints acc = random_ints(), a = random_ints();
  const I sum = vector_of(acc);
  check("add_i32", T::add_i32(sum, vector_of(a)), [&](int i) { return acc.v[i] + a.v[i]; });
  check("add_i32", T::add_i32(T::set1_i32(INT32_MAX), T::set1_i32(1)),
        [](int) { return INT32_MIN; });
  Ints parts[4];
  for (Ints& part : parts) {
    for (int32_t& each : part.v) each = random_int(0, 255);
  }
  const Bytes packed = bytes_of(T::pack_bytes(vector_of(parts[0]), vector_of(parts[1]),
                                              vector_of(parts[2]), vector_of(parts[3])));
  check_stored("pack_bytes", packed.v, 4 * W, [&](int i) { return parts[i % 4].v[i / 4]; });
  const Bytes nibbles = bytes_in(0, 255);
  I low, high;
  T::split_nibbles(vector_of(nibbles), &low, &high);
  check_stored("split_nibbles", bytes_of(low).v, 4 * W, [&](int i) { return nibbles.v[i] & 15; });
  check_stored("split_nibbles", bytes_of(high).v, 4 * W, [&](int i) { return nibbles.v[i] >> 4; });
}

// With the largest numbers as well, whose sums a saturating product would clip.
void test_products(bool largest) {
  const Ints acc = random_ints();
  const I sum = vector_of(acc);
  const Bytes query = largest ? bytes_in(-127, -127) : bytes_in(-127, 127);
  const Bytes key = largest ? bytes_in(-128, -128) : bytes_in(-128, 127);
  const I q = vector_of(query), k = vector_of(key);
  check("dot_key_bytes", T::dot_key_bytes(sum, k, q),
        dots(acc, [&](int e) { return (key.s8(e) + T::kKeyBias) * query.s8(e); }));
  const Bytes nibbles = largest ? bytes_in(255, 255) : bytes_in(0, 255);
  const Bytes odd = largest ? query : bytes_in(-127, 127);
  check("dot_key_nibbles", T::dot_key_nibbles(sum, vector_of(nibbles), q, vector_of(odd)),
        dots(acc, [&](int e) {
          return (nibbles.v[e] & 15) * query.s8(e) + (nibbles.v[e] >> 4) * odd.s8(e);
        }));
  const Bytes weights =
      largest ? bytes_in(T::kMaxWeight, T::kMaxWeight) : bytes_in(0, T::kMaxWeight);
  check("dot_weights", T::dot_weights(sum, vector_of(weights), k),
        dots(acc, [&](int e) { return weights.v[e] * key.s8(e); }));
  const Bytes codes = largest ? bytes_in(15, 15) : bytes_in(0, 15), all = bytes_in(0, 255);
  check("dot_nibble_weights", T::dot_nibble_weights(sum, vector_of(all), vector_of(codes)),
        dots(acc, [&](int e) { return all.v[e] * codes.v[e]; }));

  // Of the tiles: bytes, or numbers of 16 bits.
  if constexpr (T::kInt8Group == 4) {
    const Bytes& tile_key = T::kTileKeyBias == 0 ? key : all;
    const auto wide = [&](int e) { return T::kTileKeyBias == 0 ? key.s8(e) : all.v[e]; };
    check("dot_keys", T::dot_keys(sum, vector_of(tile_key), q),
          dots(acc, [&](int e) { return wide(e) * query.s8(e); }));
    check("dot_values", T::dot_values(sum, k, vector_of(all)),
          dots(acc, [&](int e) { return all.v[e] * key.s8(e); }));
  } else {
    int16_t a[2 * W], b[2 * W];
    for (int i = 0; i < 2 * W; ++i) {
      a[i] = static_cast<int16_t>(random_int(-128, 255));
      b[i] = static_cast<int16_t>(random_int(-128, 255));
    }
    const auto expected = [&](int i) {
      return acc.v[i] + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    };
    check("dot_keys", T::dot_keys(sum, T::load_i32(a), T::load_i32(b)), expected);
    check("dot_values", T::dot_values(sum, T::load_i32(a), T::load_i32(b)), expected);
  }
}

#ifdef TARGET_HAS_BF16
void test_bf16() {
  Floats a = floats_in(-4.0f, 4.0f), b = floats_in(-4.0f, 4.0f);
  a.v[0] = float_from_bits(0x3f808000u);  // halfway, to even
  a.v[1] = float_from_bits(0x3f818000u);
  a.v[2] = kInfinity;
  a.v[3] = 3.4e38f;
  uint16_t pair[2 * W];
  T::store_bf16_pair(reinterpret_cast<uint32_t*>(pair), vector_of(a), vector_of(b));
  check_stored("store_bf16_pair", pair, 2 * W,
               [&](int i) { return bf16_from_float(i < W ? a.v[i] : b.v[i - W]); });
  uint16_t x[2 * W], y[2 * W];
  for (int i = 0; i < 2 * W; ++i) {
    x[i] = bf16_from_float(random_in(-4.0f, 4.0f));
    y[i] = bf16_from_float(random_in(-4.0f, 4.0f));
  }
  const Floats found = lanes_of(T::dot_bf16(vector_of(b), T::load_i32(x), T::load_i32(y)));
  for (int i = 0; i < W; ++i) {
    double sum = static_cast<double>(b.v[i]);
    for (int e = 2 * i; e < 2 * i + 2; ++e) {
      sum +=
          static_cast<double>(float_from_bf16(x[e])) * static_cast<double>(float_from_bf16(y[e]));
    }
    const double each = static_cast<double>(found.v[i]);
    if (std::fabs(each - sum) > 1e-5) fail("dot_bf16", i, each, sum);
  }
  uint16_t both[2 * W];
  T::store_i32(both, T::interleave_bf16(vector_of(a), vector_of(b)));
  check_stored("interleave_bf16", both, 2 * W,
               [&](int i) { return bf16_from_float(i % 2 == 0 ? a.v[i / 2] : b.v[i / 2]); });
  if (T::any_less(vector_of(b), vector_of(b))) fail("any_less", 0, 1.0, 0.0);
  Floats larger = b;
  const int lane = random_int(0, W - 1);
  larger.v[lane] += 1.0f;
  if (!T::any_less(vector_of(b), vector_of(larger))) fail("any_less", lane, 0.0, 1.0);
  Floats power = b;
  power.v[0] = -std::numeric_limits<float>::infinity();
  power.v[1] = -1e30f;
  power.v[2] = std::nanf("");
  const Floats powers = lanes_of(T::exp2_below(vector_of(power)));
  for (int i = 0; i < W; ++i) {
    const double exact = std::exp2(static_cast<double>(power.v[i]));
    const double each = static_cast<double>(powers.v[i]);
    const bool is_near = std::fabs(each - exact) <= 8e-5 * exact;
    if (i == 2 ? !std::isnan(each) : !is_near) fail("exp2_below", i, each, exact);
  }
}
#endif

int run() {
  static_assert(T::kRegisters >= 16 && W % 4 == 0 &&
                T::kTileRows * T::kTileVectors <= T::kRegisters);
  test_loads();
  for (int round = 0; round < 2000; ++round) {
    test_arithmetic();
    test_rounding();
    test_random_bits();
    test_reductions();
    test_exp2<5>(3e-7);
    test_exp2<3>(8e-5);
    test_stores();
    test_orders();
    test_integers();
    test_products(round % 8 == 0);
#ifdef TARGET_HAS_BF16
    test_bf16();
#endif
#ifdef TARGET_HAS_ROWS
    test_lane<T, 0>(round % 8 == 0);
    test_lane<T, 3>(round % 8 == 0);
#endif
#ifdef TARGET_HAS_BLOCKS
    test_blocks<T>(round % 8 == 0);
#endif
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_gluon::cpu

int main() { return jax_gluon::cpu::run(); }
