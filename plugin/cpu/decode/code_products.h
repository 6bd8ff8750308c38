// Products with rows of 8-bit or 4-bit codes, in integers, for attention of a few queries: a row is
// read as it is stored and unpacked in registers.
#pragma once

#include <cstdint>

#include "cpu/rows/rows.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

// What the values of keys weigh for one row of probabilities: as integers, and what 1 is worth.
struct CodeWeightsOfRow {
  const uint32_t* bytes;  // of 4 keys each, `stride` apart
  int64_t stride;
  const float* unit;
  // Where a row of values has several groups, that stand side by side in `bytes` and `unit`: of
  // each vector of a row the first lane's group, and all lanes' from there; else null.
  const int32_t *lane_group, *first_group;

  // Those from key j on, a multiple of 4.
  CodeWeightsOfRow from(int64_t j) const {
    return {bytes + j / 4 * stride, stride, unit, lane_group, first_group};
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

  // Adds the sum over rows j of weight[j][group of the element] * row j, of `bytes`, to `out`.
  static void add_rows(StoredRows rows, int64_t bytes, CodeWeightsOfRow weights, float* out) {
    for (int64_t byte = 0; byte < bytes; byte += kBytes, out += kStep) {
      const char* data = rows.data + byte;
      if (weights.lane_group == nullptr) {
        add_step<false>({data, rows.stride, rows.count}, weights, 0, out);
      } else {
        add_step<true>({data, rows.stride, rows.count}, weights, byte / W, out);
      }
    }
  }

 private:
  // A step of the rows, whose vectors are `vector` and the next three.
  template <bool kGrouped>
  static JAX_GLUON_INLINE void add_step(StoredRows rows, CodeWeightsOfRow w, int64_t vector,
                                        float* out) {
    const int32_t* lane_group = kGrouped ? w.lane_group + vector * W : nullptr;
    const int32_t* first_group = kGrouped ? w.first_group + vector : nullptr;
    const uint32_t* weights = w.bytes;
    I acc[4 * kHalves];
    JAX_GLUON_UNROLL
    for (int v = 0; v < 4 * kHalves; ++v) acc[v] = Isa::set1_i32(0);
    for (int64_t j = 0; j < rows.count; j += 4, weights += w.stride) {
      // Past the last row its weights are zero.
      const char* row = rows.data + j * rows.stride;
      const int64_t left = rows.count - j;
      const char* one = left > 1 ? row + rows.stride : row;
      const char* two = left > 2 ? one + rows.stride : row;
      const char* three = left > 3 ? two + rows.stride : row;
      I bytes[4];
      Isa::interleave(row, one, two, three, bytes);
      JAX_GLUON_UNROLL
      for (int v = 0; v < 4; ++v) {
        I weight;
        if constexpr (kGrouped) {
          weight = Isa::permute(Isa::load_i32(weights + first_group[v]),
                                Isa::load_i32(lane_group + v * W));
        } else {
          weight = Isa::set1_i32(static_cast<int32_t>(*weights));
        }
        if constexpr (kNibbles) {
          I low, high;
          Isa::split_nibbles(bytes[v], &low, &high);
          acc[2 * v] = Isa::dot_weights(acc[2 * v], weight, low);
          acc[2 * v + 1] = Isa::dot_weights(acc[2 * v + 1], weight, high);
        } else {
          acc[v] = Isa::dot_weights(acc[v], weight, bytes[v]);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int v = 0; v < 4; ++v) {
      F unit;
      if constexpr (kGrouped) {
        unit = Isa::permute(Isa::load(w.unit + first_group[v]), Isa::load_i32(lane_group + v * W));
      } else {
        unit = Isa::set1(*w.unit);
      }
      JAX_GLUON_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        float* to = out + (v * kHalves + half) * W;
        const F sum = Isa::to_float(acc[v * kHalves + half]);
        Isa::store(to, Isa::fma(sum, unit, Isa::load(to)));
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
