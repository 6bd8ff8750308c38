// Block sizes, and what they cost.
//
// A simdgroup owns 8 rows (of queries, or in the dK/dV pass of keys), the height of a matrix: it
// keeps their operands and float32 sums in registers, and takes the other side from tiles in
// threadgroup memory that its threadgroup loads together. Bytes are those of two tiles, of rows of
// D elements padded by 16 bytes, which spreads a tile's rows over the banks, and, where codes are
// dequantized, of the scales and offsets of columns (32 D). Registers are 32-bit, of a thread: a
// matrix of float takes 2, of half or bfloat 1. No GPU has been asked whether they fit.
//
// | element | D   | rows | tiles, columns | Q, O, S      | Q, dO, dQ    | K, V, dK, dV      |
// |---------|-----|------|----------------|--------------|--------------|-------------------|
// | 16 bits |  64 | 64   | 18,432         |  8 + 16 + 16 |  8 +  8 + 16 |  8 +  8 + 16 + 16 |
// | 16 bits | 128 | 32   | 17,408         | 16 + 32 +  8 | 16 + 16 + 32 | 16 + 16 + 32 + 32 |
// | 16 bits | 256 | 16   | 16,896         | 32 + 64 +  4 | 32 + 32 + 64 | 32 + 32 + 64 + 64 |
// | float   |  64 | 32   | 17,408 + 2,048 | 16 + 16 +  8 | 16 + 16 + 16 | 16 + 16 + 16 + 16 |
// | float   | 128 | 16   | 16,896 + 4,096 | 32 + 32 +  4 | 32 + 32 + 32 | 32 + 32 + 32 + 32 |
// | float   | 256 | 8    | 16,640 + 8,192 | 64 + 64 +  2 | 64 + 64 + 64 | 64 + 64 + 64 + 64 |
//
// A tile's rows are as many as fill 8 KiB, so that two tiles take about half of the 32 KiB that a
// threadgroup may have. Forward's products of a tile row and a simdgroup are 8 (H + V) whatever the
// block, since matrices without a visible pair are skipped one by one; larger tiles save barriers
// (two for each tile), more simdgroups save device bytes (a threadgroup reads once whatever any of
// its rows sees).
#pragma once

constant constexpr int kSimdgroups = 4;
constant constexpr int kThreads = 32 * kSimdgroups;
constant constexpr int kBlockRows = 8 * kSimdgroups;

template <typename M, int D>
struct BlockSizes {
  static constant constexpr int kTileRows = 8192 / (D * int(sizeof(M)));
  // Elements from a tile's row to the next.
  static constant constexpr int kStride = D + 16 / int(sizeof(M));
  static constant constexpr int kTileElements = kTileRows * kStride;
  // Scale and offset of each column, for two blocks of tokens: where codes are dequantized.
  static constant constexpr int kColumnParameters = sizeof(M) == 4 ? 4 * D : 1;
  // Two tiles, and a few numbers for each of their rows and columns.
  static_assert(2 * kTileElements * sizeof(M) + 32 * kTileRows + 8 * kColumnParameters + 256 <=
                    32768,
                "threadgroup memory");
};
