// What a lane of the packed operands holds, of 32 bits here and of 64 in block_cores.h, and the two
// products that attention needs of it.
//
// A `Core` fixes the format of the matrix products: a lane packs kGroup elements that are
// contiguous along the contraction. Where the target has kRowLanes, its products also take the left
// operand from a lane of a register: dot_keys<kLane>, dot_values<kLane>. Packed layouts, in lanes,
// zero-padded, R = kTileRows, C = kTileColumns:
//   row tiles     [rows / R][ceil(n / kGroup)][R]       left operand of scores: queries
//   score panels  [keys / C][ceil(n / kGroup)][C]       right operand of scores: keys
//   value panels  [columns / C][ceil(keys / kGroup)][C] right operand of P V
#pragma once

#include "cpu/memory/buffer.h"
#include "cpu/rows/rows.h"

namespace jax_gluon::cpu {
namespace {

// Lanes of a row of n elements, those of its padding too.
template <class Core>
constexpr int64_t row_lanes(int64_t n) {
  return round_up(ceil_div(n, Core::kGroup), Core::kLaneStep);
}

// What the elements are that a core multiplies.
enum class Arithmetic { kF32, kBf16, kInt8 };

constexpr const char* name_of(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kInt8   ? "int8"
         : arithmetic == Arithmetic::kBf16 ? "bfloat16"
                                           : "float32";
}

// Sizes of tiles, in rows and columns, which are those of registers whatever they hold. Rows are
// padded to a multiple of kLaneStep lanes.
template <class Isa_, int kRows = Isa_::kTileRows>
struct Tiles {
  using Isa = Isa_;
  // Whether products are of blocks of rows and columns: block_cores.h.
  static constexpr bool kHasBlocks = false;
  static constexpr int kTileRows = kRows;
  static constexpr int kTileColumns = Isa::kTileVectors * Isa::kLanes;
  static constexpr int kLaneStep = 1;
  // Rows whose scores are alive at once: enough that a panel read from L2 is used twice.
  static constexpr int kGroupRows = kTileRows >= 12 ? kTileRows : 2 * kTileRows;
};

template <class Isa>
struct F32Core : Tiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kF32;
  using Lane = float;
  using Vector = typename Isa::F;
  using Accumulator = typename Isa::F;
  static constexpr int kGroup = 1;

  static Vector load(const Lane* p) { return Isa::load(p); }
  static Vector broadcast(Lane x) { return Isa::set1(x); }
  static Accumulator zero() { return Isa::zero(); }
  static Accumulator dot_keys(Accumulator acc, Vector key, Vector query) {
    return Isa::fma(key, query, acc);
  }
  static Accumulator dot_values(Accumulator acc, Vector value, Vector probability) {
    return Isa::fma(value, probability, acc);
  }
  template <int kLane, class Row>
  static Accumulator dot_keys(Accumulator acc, Vector key, Row query) {
    return Isa::template fma_lane<kLane>(acc, key, query);
  }
  template <int kLane, class Row>
  static Accumulator dot_values(Accumulator acc, Vector value, Row probability) {
    return Isa::template fma_lane<kLane>(acc, value, probability);
  }
  static auto load_probabilities(const Lane* p) { return Isa::load_row(p); }
  static void store(void* p, Accumulator x) { Isa::store(static_cast<float*>(p), x); }
};

// Two bfloat16 a lane, products and sums in float32.
template <class Isa>
struct Bf16Core : Tiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kBf16;
  using Lane = uint32_t;
  using Vector = typename Isa::I;
  using Accumulator = typename Isa::F;
  static constexpr int kGroup = 2;

  static Vector load(const Lane* p) { return Isa::load_i32(p); }
  static Vector broadcast(Lane x) { return Isa::set1_i32(static_cast<int32_t>(x)); }
  static Accumulator zero() { return Isa::zero(); }
  static Accumulator dot_keys(Accumulator acc, Vector key, Vector query) {
    return Isa::dot_bf16(acc, key, query);
  }
  static Accumulator dot_values(Accumulator acc, Vector value, Vector probability) {
    return Isa::dot_bf16(acc, value, probability);
  }
  static void store(void* p, Accumulator x) { Isa::store(static_cast<float*>(p), x); }
};

// INT8 codes, products and sums in int32. kGroup 4: bytes, keys stored biased by kKeyBias and
// probabilities as u8; kGroup 2: both as 16-bit numbers.
template <class Isa>
struct Int8Core : Tiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kInt8;
  using Lane = uint32_t;
  using Vector = typename Isa::I;
  using Accumulator = typename Isa::I;
  static constexpr int kGroup = Isa::kInt8Group;
  static constexpr int kKeyBias = Isa::kTileKeyBias;

  static Vector load(const Lane* p) { return Isa::load_i32(p); }
  static Vector broadcast(Lane x) { return Isa::set1_i32(static_cast<int32_t>(x)); }
  static Accumulator zero() { return Isa::set1_i32(0); }
  static Accumulator dot_keys(Accumulator acc, Vector key, Vector query) {
    return Isa::dot_keys(acc, key, query);
  }
  static Accumulator dot_values(Accumulator acc, Vector value, Vector probability) {
    return Isa::dot_values(acc, value, probability);
  }
  template <int kLane, class Row>
  static Accumulator dot_keys(Accumulator acc, Vector key, Row query) {
    return Isa::template dot_keys_lane<kLane>(acc, key, query);
  }
  template <int kLane, class Row>
  static Accumulator dot_values(Accumulator acc, Vector value, Row probability) {
    return Isa::template dot_values_lane<kLane>(acc, value, probability);
  }
  static auto load_probabilities(const Lane* p) {
    if constexpr (Isa::kShiftsProbabilities) {
      return Isa::load_shifted_row(p);
    } else {
      return Isa::load_row(p);
    }
  }
  static void store(void* p, Accumulator x) { Isa::store_i32(p, x); }
};

}  // namespace
}  // namespace jax_gluon::cpu
