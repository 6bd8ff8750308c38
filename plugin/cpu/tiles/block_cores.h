// Cores of targets that multiply blocks of matrices: 2 rows of 8 bytes with 2 columns of 8 bytes.
// A lane has 64 bits, so that two rows' lanes, side by side in a row tile, are a block; and those
// of two columns in a panel.
#pragma once

#include "cpu/tiles/cores.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
struct BlockInt8Core : Tiles<Isa, Isa::kBlockTileRows> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kInt8;
  using Lane = uint64_t;
  using Accumulator = typename Isa::I;
  using Block = typename Isa::Row;
  static constexpr int kGroup = 8, kKeyBias = 0;
  static constexpr bool kHasBlocks = true;

  static Block multiply_keys(Block acc, Block queries, Block keys) {
    return Isa::multiply_codes(acc, queries, keys);
  }
  static Block multiply_values(Block acc, Block probabilities, Block values) {
    return Isa::multiply_probabilities(acc, probabilities, values);
  }
  static Accumulator row_of(Block low, Block high) { return Isa::ints_of(low, high); }
  static void store(void* p, Accumulator x) { Isa::store_i32(p, x); }
};

template <class Isa>
struct BlockBf16Core : Tiles<Isa, Isa::kBlockTileRows> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kBf16;
  using Lane = uint64_t;
  using Accumulator = typename Isa::F;
  using Block = typename Isa::Row;
  static constexpr int kGroup = 4;
  static constexpr bool kHasBlocks = true;

  static Block multiply_keys(Block acc, Block queries, Block keys) {
    return Isa::multiply_bf16(acc, queries, keys);
  }
  static Block multiply_values(Block acc, Block probabilities, Block values) {
    return Isa::multiply_bf16(acc, probabilities, values);
  }
  static Accumulator row_of(Block low, Block high) { return Isa::floats_of(low, high); }
  static void store(void* p, Accumulator x) { Isa::store(static_cast<float*>(p), x); }
};

}  // namespace
}  // namespace jax_gluon::cpu
