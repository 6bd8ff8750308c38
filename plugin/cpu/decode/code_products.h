// Products with rows of 8-bit or 4-bit codes, in integers, for attention of a few queries: a row is
// read as it is stored and unpacked in registers.
#pragma once

#include "cpu/rows/rows.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, bool kNibbles>
struct CodeProducts {
  using F = typename Isa::F;
  using I = typename Isa::I;
  static constexpr int64_t W = Isa::kLanes;
  static constexpr int kHalves = kNibbles ? 2 : 1, kVectors = 4 * kHalves;
  // Bytes, and elements, of a row that are unpacked at a time.
  static constexpr int64_t kBytes = 4 * W, kStep = kBytes * kHalves;
  static constexpr int64_t bytes(int64_t elements) { return elements / kHalves; }
  // Products are those of codes that are this much larger.
  static constexpr int kKeyBias = kNibbles ? 8 : Isa::kKeyBias;
  static constexpr int kValueBias = kNibbles ? 8 : 0;
  // Weights are integers up to this.
  static constexpr int kMaxWeight = kNibbles ? 255 : Isa::kMaxWeight;

  // Where element h of a query stands: of a step, the even ones come before the odd ones.
  static constexpr int64_t query_position(int64_t h) {
    if constexpr (!kNibbles) return h;
    return h / kStep * kStep + h % 2 * kBytes + h % kStep / 2;
  }
  // Where element h of a sum of values stands: as Isa::interleave leaves the bytes.
  static constexpr int64_t value_position(int64_t h) {
    const int64_t byte = h / kHalves, rest = byte % kBytes;
    const int64_t vector = (byte / kBytes * 4 + rest % 16 / 4) * kHalves + h % kHalves;
    return vector * W + rest / 16 * 4 + rest % 4;
  }

  // Vectors of a step of a query from their natural order.
  static void put_in_order(F* x) {
    if constexpr (kNibbles) {
      F halves[4][2];
      JAX_GLUON_UNROLL
      for (int i = 0; i < 4; ++i) Isa::deinterleave(x[2 * i], x[2 * i + 1], halves[i]);
      JAX_GLUON_UNROLL
      for (int i = 0; i < 4; ++i) {
        x[i] = halves[i][0];
        x[4 + i] = halves[i][1];
      }
    }
  }

  // Biased products, one for each lane to be summed, of a query with a row of `bytes`, a multiple
  // of kBytes.
  static I dot(const char* row, const int8_t* query, int64_t bytes) {
    I acc = Isa::set1_i32(0);
    for (int64_t byte = 0; byte < bytes; byte += kBytes) {
      const I codes = Isa::load_i32(row + byte);
      const I even = Isa::load_i32(query + byte * kHalves);
      if constexpr (kNibbles) {
        const I odd = Isa::load_i32(query + byte * kHalves + kBytes);
        acc = Isa::dot_key_nibbles(acc, codes, even, odd);
      } else {
        acc = Isa::dot_key_bytes(acc, codes, even);
      }
    }
    return acc;
  }

  // out += sum over rows j of weights[j / 4 * quad][group of the byte].byte[j % 4] * code *
  // factors[group of the byte]. One group: `index` is null; else index[vector] holds the groups of
  // its lanes, counted from first[vector].
  static void add_rows(const char* rows, int64_t stride, int64_t count, int64_t bytes,
                       const uint32_t* weights, int64_t quad, const int32_t* index,
                       const int32_t* first, const float* factors, float* out) {
    if (index == nullptr) {
      for (int64_t byte = 0; byte < bytes; byte += kBytes, out += kStep) {
        add_step<false>(rows + byte, stride, count, weights, quad, nullptr, nullptr, factors, out);
      }
      return;
    }
    for (int64_t byte = 0; byte < bytes; byte += kBytes, out += kStep) {
      add_step<true>(rows + byte, stride, count, weights, quad, index, first, factors, out);
      index += 4 * W;
      first += 4;
    }
  }

 private:
  template <bool kGrouped>
  static void add_step(const char* rows, int64_t stride, int64_t count, const uint32_t* weights,
                       int64_t quad, const int32_t* index, const int32_t* first,
                       const float* factors, float* out) {
    I acc[4 * kHalves];
    JAX_GLUON_UNROLL
    for (int v = 0; v < 4 * kHalves; ++v) acc[v] = Isa::set1_i32(0);
    for (int64_t j = 0; j < count; j += 4, weights += quad) {
      // Past the last row its weights are zero.
      const char* row = rows + j * stride;
      const int64_t left = count - j;
      const char* one = left > 1 ? row + stride : row;
      const char* two = left > 2 ? one + stride : row;
      const char* three = left > 3 ? two + stride : row;
      I quads[4];
      Isa::interleave(row, one, two, three, quads);
      JAX_GLUON_UNROLL
      for (int v = 0; v < 4; ++v) {
        I weight;
        if constexpr (kGrouped) {
          weight = Isa::permute(Isa::load_i32(weights + first[v]), Isa::load_i32(index + v * W));
        } else {
          weight = Isa::set1_i32(static_cast<int32_t>(*weights));
        }
        if constexpr (kNibbles) {
          I low, high;
          Isa::split_nibbles(quads[v], &low, &high);
          acc[2 * v] = Isa::dot_weights(acc[2 * v], weight, low);
          acc[2 * v + 1] = Isa::dot_weights(acc[2 * v + 1], weight, high);
        } else {
          acc[v] = Isa::dot_weights(acc[v], weight, quads[v]);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int v = 0; v < 4; ++v) {
      F factor;
      if constexpr (kGrouped) {
        factor = Isa::permute(Isa::load(factors + first[v]), Isa::load_i32(index + v * W));
      } else {
        factor = Isa::set1(*factors);
      }
      JAX_GLUON_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        float* to = out + (v * kHalves + half) * W;
        const F sum = Isa::to_float(acc[v * kHalves + half]);
        Isa::store(to, Isa::fma(sum, factor, Isa::load(to)));
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
