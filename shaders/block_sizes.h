// Block sizes, and what they cost.
//
// A simdgroup owns 8 rows (of queries, or in the dK/dV pass of keys), the height of a matrix: it
// keeps their operands and float32 sums in registers, and takes the other side from tiles in
// threadgroup memory that its threadgroup loads together. Bytes are those of two tiles, of rows of
// D elements padded by 16 bytes, which spreads a tile's rows over the banks; registers are 32-bit,
// of a thread: a matrix of float takes 2, of half or bfloat 1.
//
// | element | D   | tile rows | bytes  | forward: Q, O, S | dQ: Q, dO, dQ | dK/dV: K, V, dK, dV |
// |---------|-----|-----------|--------|------------------|---------------|---------------------|
// | 16 bits |  64 | 64        | 18,432 |   8 + 16 + 16    |   8 + 8 + 16  |   8 + 8 + 16 + 16   |
// | 16 bits | 128 | 32        | 17,408 |  16 + 32 + 8     |  16 + 16 + 32 |  16 + 16 + 32 + 32  |
// | 16 bits | 256 | 16        | 16,896 |  32 + 64 + 4     |  32 + 32 + 64 |  32 + 32 + 64 + 64  |
// | float   |  64 | 32        | 17,408 |  16 + 16 + 8     |  16 + 16 + 16 |  16 + 16 + 16 + 16  |
// | float   | 128 | 16        | 16,896 |  32 + 32 + 4     |  32 + 32 + 32 |  32 + 32 + 32 + 32  |
// | float   | 256 | 8         | 16,640 |  64 + 64 + 2     |  64 + 64 + 64 |  64 + 64 + 64 + 64  |
//
// A tile's rows are as many as fill 8 KiB: two tiles are about half of the 32 KiB that a
// threadgroup may have, so two threadgroups fit one such budget. Products of a tile row and a
// simdgroup are 8 (H + V) in forward whatever the block, since matrices without a visible pair are
// skipped one by one; larger tiles save barriers (two for each block), larger threadgroups device
// bytes (each reads all visible rows of the other side once).
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
