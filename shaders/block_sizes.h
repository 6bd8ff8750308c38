// Block sizes, and what they cost.
//
// A simdgroup owns 8 rows (of queries, or in the dK/dV pass of keys), the height of a matrix: it
// keeps their operands and float32 sums in registers, and takes the other side from tiles in
// threadgroup memory that its threadgroup loads together. Bytes are those of two tiles, of rows of
// D elements padded by 16 bytes, which spreads a tile's rows over the banks, and, where codes are
// dequantized, of what is staged of their columns (kColumnParameters: 32 D, and 128 for powers).
// Registers are 32-bit, of a thread: a matrix of float takes 2, of half or bfloat 1. No GPU has
// been asked whether they fit.
//
// | element | D   | rows | tiles, columns | Q, O, S      | Q, dO, dQ *  | K, V, dK, dV      |
// |---------|-----|------|----------------|--------------|--------------|-------------------|
// | 16 bits |  64 | 64   | 18,432         |  8 + 16 + 16 |  8 +  8 + 16 |  8 +  8 + 16 + 16 |
// | 16 bits | 128 | 32   | 17,408         | 16 + 32 +  8 | 16 + 16 + 32 | 16 + 16 + 32 + 32 |
// | 16 bits | 256 | 16   | 16,896         | 32 + 64 +  4 | 32 + 32 + 64 | 32 + 32 + 64 + 64 |
// | float   |  64 | 32   | 17,408 + 2,176 | 16 + 16 +  8 | 16 + 16 + 16 | 16 + 16 + 16 + 16 |
// | float   | 128 | 16   | 16,896 + 4,224 | 32 + 32 +  4 | 32 + 32 + 32 | 32 + 32 + 32 + 32 |
// | float   | 256 | 8    | 16,640 + 8,320 | 64 + 64 +  2 | 64 + 64 + 64 | 64 + 64 + 64 + 64 |
//
// * And P K, as many as dQ, where delta is refined: for all operands but float32.
//
// A tile's rows are as many as fill 8 KiB, so that two tiles take about half of the 32 KiB that a
// threadgroup may have. Forward's products of a tile row and a simdgroup are 8 (H + V) whatever the
// block, since matrices without a visible pair are skipped one by one; larger tiles save barriers
// (two for each tile), more simdgroups save device bytes (a threadgroup reads once whatever any of
// its rows sees).
#pragma once

#include "bindings.h"

static_assert(kThreads == 32 * kSimdgroups && kBlockRows == 8 * kSimdgroups, "sizes");

// What is staged of a block of tokens: scales and offsets of D columns, and the numbers that keep
// the powers of up to 40 tokens.
template <int D>
struct StagedColumns {
  static constant constexpr int kCells = 8;
  static constant constexpr int kFloats = 2 * D + kCells;
};

template <typename M, int D>
struct BlockSizes {
  static constant constexpr int kTileRows = kTileBytes / (D * int(sizeof(M)));
  // Elements from a tile's row to the next.
  static constant constexpr int kStride = D + 16 / int(sizeof(M));
  static constant constexpr int kTileElements = kTileRows * kStride;
  // Scale and offset of each column, and powers of tokens, for two blocks of tokens: where codes
  // are dequantized.
  static constant constexpr int kColumnParameters =
      sizeof(M) == 4 ? 2 * StagedColumns<D>::kFloats : 1;
  // Two tiles, and a few numbers for each of their rows and columns.
  static_assert(2 * kTileElements * sizeof(M) + 32 * kTileRows + 8 * kColumnParameters + 256 <=
                    32768,
                "threadgroup memory");
};

// The gluon pipelines. Granules of a ring are filled ahead, and used one subtile at a
// time; a slot takes another granule only after a barrier that follows its last use. Logits are
// bytes of a lane's (of two subtiles where scores are made ahead), those of baseline in brackets;
// ring is bytes of rows, columns, scales and flags; barriers are those of 64 keys, as many as
// baseline's, and a walk has no more, but for one where tokens have powers.
//
// | element | D   | granule | subtile | ahead | logits  | ring   | barriers |
// |---------|-----|---------|---------|-------|---------|--------|----------|
// | 16 bits |  64 | 32      | 16      | yes   | 32 (64) | 23,948 | 2        |
// | 16 bits | 128 | 16      | 8       | yes   | 16 (32) | 22,348 | 4        |
// | 16 bits | 256 | 8       | 8       | no    | 8 (16)  | 17,292 | 8        |
// | float   |  64 | 16      | 8       | yes   | 16 (32) | 25,060 | 4        |
// | float   | 128 | 8       | 8       | no    | 8 (16)  | 21,508 | 8        |
// | float   | 256 | 8       | 8       | no    | 8 (8)   | 25,156 | 16       |
//
// Half of baseline's logits are alive, but for float at 256, where a tile has one matrix in a row
// and there is room for one slot of keys and of values: there a granule is only read ahead, into
// registers, and two barriers enclose its writing. Scores are not made ahead where two subtiles
// would be a whole tile of baseline's.
//
// Backward's subtile is one matrix in either pipeline: P and dS of 8 x 8 scores are made and used
// at once. Its gluon pipelines have two slots (one for float at 256), and make the products of the
// next matrix ahead where a granule has one. Their rings:
//
// | element | D   | dQ ring | dK, dV ring | barriers |
// |---------|-----|---------|-------------|----------|
// | 16 bits |  64 | 19,212  | 20,488      | 2        |
// | 16 bits | 128 | 17,932  | 18,696      | 4        |
// | 16 bits | 256 | 17,292  | 17,800      | 8        |
// | float   |  64 | 20,100  | 18,696      | 4        |
// | float   | 128 | 21,508  | 17,800      | 8        |
// | float   | 256 | 25,156  | 17,096      | 16       |
template <typename M, int D>
struct RingSizes {
  static constant constexpr int kTileRows = BlockSizes<M, D>::kTileRows;
  static constant constexpr bool kHasRoom = kTileRows > 8;
  static constant constexpr int kGranuleRows = kHasRoom ? kTileRows / 2 : 8;
  // Of values.
  static constant constexpr int kSlots = kHasRoom ? 2 : 1;
  // Whether scores of the next subtile are made before those at hand are used, across granules:
  // keys are filled two granules ahead.
  static constant constexpr bool kLooksAhead = kGranuleRows > 8;
  static constant constexpr int kKeySlots = kLooksAhead ? 3 : kSlots;
  static constant constexpr int kSubtileRows = kLooksAhead ? kGranuleRows / 2 : 8;
};
