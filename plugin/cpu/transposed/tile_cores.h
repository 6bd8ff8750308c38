// What the tiles of the transposed kernel multiply. S^T = K Q^T: a row is a key, a column a query.
//
// Layouts, in 32-bit lanes, padded with zeros:
//   keys     [keys][row_lanes]                        rows as they are
//   queries  [queries / 16][row_lanes][16]            the row tiles of cores.h
//   values   [keys / 32][columns / 16][16][16]        bfloat16: a row is a column of V
//   P        [keys / 32][16][16]                      bfloat16: a lane has two keys of a query
#pragma once

#include "cpu/tiles/cores.h"

namespace jax_gluon::cpu {
namespace {

// Keys of a step: P of as many is a tile. Queries of a column of tiles, and of a pair of columns.
constexpr int kUnitKeys = 32, kTileQueries = 16, kPairQueries = 32;
// Steps whose P is multiplied with values at once: each time, all sums of values are loaded and
// stored.
constexpr int kBlockUnits = 4;
// Bytes from row to row of a tile in scratch, and of all of it.
constexpr int64_t kTileStride = 64, kTileBytes = 16 * kTileStride;

template <class Isa_>
struct TransposedTiles {
  using Isa = Isa_;
  using Lane = uint32_t;
  static_assert(Isa::kLanes == kTileQueries);
  static constexpr int kTileRows = kTileQueries, kTileColumns = 16;
  static constexpr int kGroupRows = kPairQueries;
  static constexpr int kLaneStep = 16;
};

template <class Isa>
struct TransposedBf16Core : TransposedTiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kBf16;
  static constexpr int kGroup = 2;

  template <int c, int a, int b>
  static void dot_keys() {
    Isa::Tile::template dot_bf16<c, a, b>();
  }
};

// Codes of queries, keys and values on vectors: queries are biased by 128, as `u8` of u8 . s8.
template <class Isa>
struct TransposedCodesCore : TransposedTiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kInt8;
  static constexpr int kGroup = 4, kKeyBias = 0, kLaneStep = 1;
};

// On tiles, codes of queries and keys; values as bfloat16, since probabilities of 8 bits would need
// a rescaling for every 64 keys: by count, more work of vectors than is saved in tiles.
template <class Isa>
struct TransposedInt8Core : TransposedTiles<Isa> {
  static constexpr Arithmetic kArithmetic = Arithmetic::kInt8;
  static constexpr int kGroup = 4, kKeyBias = 0;

  template <int c, int a, int b>
  static void dot_keys() {
    Isa::Tile::template dot_s8<c, a, b>();
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
