// Products with rows of 8-bit or 4-bit codes, in integers, for attention of a few queries: a row is
// read as it is stored and unpacked in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/rows/rows.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

// What the values of keys weigh for the rows of probabilities of a head: as integers, and what 1 is
// worth.
struct CodeWeightsOfHead {
  const uint32_t* bytes;  // of 4 keys each, `stride` apart
  int64_t stride;
  const float* unit;
  int64_t row_step;  // from one row to the next, in `bytes` and in `unit`
  // Where a row of values has several groups, that stand side by side in `bytes` and `unit`: of
  // each vector of a row the first lane's group, and all lanes' from there; else null.
  const int32_t *lane_group, *first_group;

  // Those from row r and key j on, a multiple of 4.
  CodeWeightsOfHead from(int64_t r, int64_t j) const {
    return {bytes + r * row_step + j / 4 * stride,
            stride,
            unit + r * row_step,
            row_step,
            lane_group,
            first_group};
  }
};

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
  static JAX_GLUON_INLINE void put_in_order(F* x) {
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

  // Calls body with the steps of a row of `bytes` as a constant where they are few.
  static constexpr int kAnySteps = 0, kPartOfStep = -1;
  template <class Body>
  static void with_steps(int64_t bytes, Body body) {
    if (bytes == kBytes) return body(std::integral_constant<int, 1>());
    if (bytes == 2 * kBytes) return body(std::integral_constant<int, 2>());
    if (bytes == 4 * kBytes) return body(std::integral_constant<int, 4>());
    if (bytes < kBytes) return body(std::integral_constant<int, kPartOfStep>());
    body(std::integral_constant<int, kAnySteps>());
  }

  // Biased products, one for each lane to be summed, of a query with a row of `bytes`.
  template <int kSteps>
  static JAX_GLUON_INLINE I dot(const char* row, const int8_t* query, int64_t bytes) {
    I acc = Isa::set1_i32(0);
    if constexpr (kSteps > 0) {
      JAX_GLUON_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        acc = dot_step(acc, Isa::load_i32(row + step * kBytes), query + step * kStep);
      }
      return acc;
    }
    int64_t byte = 0;
    for (; kSteps != kPartOfStep && byte + kBytes <= bytes; byte += kBytes) {
      acc = dot_step(acc, Isa::load_i32(row + byte), query + byte * kHalves);
    }
    if (byte == bytes) return acc;
    const I last = Isa::load_bytes(row + byte, static_cast<int>(bytes - byte));
    return dot_step(acc, last, query + byte * kHalves);
  }

  // Rows of sums that are added to at a time: as many as the registers hold, so that a row of
  // values is unpacked once for them.
  static constexpr int kRows = Isa::kRegisters / (8 * kHalves);

  // Adds the sum over rows j of weight[r][j][group of the element] * row j, of `bytes`, to each of
  // `count` sums r, that are `out_step` apart.
  static void add_rows(const StoredRows& rows, int64_t bytes, const CodeWeightsOfHead& weights,
                       int64_t count, float* out, int64_t out_step) {
    // Rows whose distance is a power of two share a set of the first cache, which holds eight: of
    // more, a line is gone before its second step.
    const int64_t block = kBytes < 64 && rows.stride > bytes ? 8 : rows.count;
    for (int64_t j = 0; j < rows.count; j += block) {
      const StoredRows some = rows.part(j, std::min(j + block, rows.count));
      int64_t r = 0;
      for (; r + kRows <= count; r += kRows) {
        add_some<kRows>(some, bytes, weights.from(r, j), out + r * out_step, out_step);
      }
      for (; r < count; ++r) {
        add_some<1>(some, bytes, weights.from(r, j), out + r * out_step, out_step);
      }
    }
  }

 private:
  static JAX_GLUON_INLINE I dot_step(I acc, I codes, const int8_t* query) {
    const I even = Isa::load_i32(query);
    if constexpr (!kNibbles) return Isa::dot_key_bytes(acc, codes, even);
    return Isa::dot_key_nibbles(acc, codes, even, Isa::load_i32(query + kBytes));
  }

  template <int kSums>
  static void add_some(StoredRows rows, int64_t bytes, const CodeWeightsOfHead& weights, float* out,
                       int64_t out_step) {
    for (int64_t byte = 0; byte < bytes; byte += kBytes, rows.data += kBytes, out += kStep) {
      const int64_t left = bytes - byte;
      if (weights.lane_group == nullptr) {
        left < kBytes ? add_step<kSums, false, true>(rows, left, weights, 0, out, out_step)
                      : add_step<kSums, false, false>(rows, left, weights, 0, out, out_step);
      } else {
        const int64_t vector = byte / W;
        left < kBytes ? add_step<kSums, true, true>(rows, left, weights, vector, out, out_step)
                      : add_step<kSums, true, false>(rows, left, weights, vector, out, out_step);
      }
    }
  }

  // A step of the rows, whose vectors are `vector` and the next three, and of which `bytes` are
  // stored.
  template <int kSums, bool kGrouped, bool kPart>
  static JAX_GLUON_INLINE void add_step(const StoredRows& rows, int64_t bytes,
                                        const CodeWeightsOfHead& w, int64_t vector, float* out,
                                        int64_t out_step) {
    const int32_t* lane_group = kGrouped ? w.lane_group + vector * W : nullptr;
    const int32_t* first_group = kGrouped ? w.first_group + vector : nullptr;
    const auto load = [&](const char* row) {
      if constexpr (kPart) return Isa::load_bytes(row, static_cast<int>(bytes));
      return Isa::load_i32(row);
    };
    I acc[kSums][4 * kHalves];
    JAX_GLUON_UNROLL
    for (int r = 0; r < kSums; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < 4 * kHalves; ++v) acc[r][v] = Isa::set1_i32(0);
    }
    const uint32_t* weights = w.bytes;
    for (int64_t j = 0; j < rows.count; j += 4, weights += w.stride) {
      // Past the last row its weights are zero.
      const char* row = rows.data + j * rows.stride;
      const int64_t left = rows.count - j;
      const char* one = left > 1 ? row + rows.stride : row;
      const char* two = left > 2 ? one + rows.stride : row;
      const char* three = left > 3 ? two + rows.stride : row;
      I codes[4];
      Isa::interleave(load(row), load(one), load(two), load(three), codes);
      JAX_GLUON_UNROLL
      for (int v = 0; v < 4; ++v) {
        I low = codes[v], high = low;
        if constexpr (kNibbles) Isa::split_nibbles(codes[v], &low, &high);
        JAX_GLUON_UNROLL
        for (int r = 0; r < kSums; ++r) {
          I weight;
          if constexpr (kGrouped) {
            weight = Isa::permute(Isa::load_i32(weights + r * w.row_step + first_group[v]),
                                  Isa::load_i32(lane_group + v * W));
          } else {
            weight = Isa::set1_i32(static_cast<int32_t>(weights[r * w.row_step]));
          }
          if constexpr (kNibbles) {
            acc[r][2 * v] = Isa::dot_nibble_weights(acc[r][2 * v], weight, low);
            acc[r][2 * v + 1] = Isa::dot_nibble_weights(acc[r][2 * v + 1], weight, high);
          } else {
            acc[r][v] = Isa::dot_weights(acc[r][v], weight, low);
          }
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int r = 0; r < kSums; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < 4; ++v) {
        F unit;
        if constexpr (kGrouped) {
          unit = Isa::permute(Isa::load(w.unit + r * w.row_step + first_group[v]),
                              Isa::load_i32(lane_group + v * W));
        } else {
          unit = Isa::set1(w.unit[r * w.row_step]);
        }
        JAX_GLUON_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          float* to = out + r * out_step + (v * kHalves + half) * W;
          const F sum = Isa::to_float(acc[r][v * kHalves + half]);
          Isa::store(to, Isa::fma(sum, unit, Isa::load(to)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
