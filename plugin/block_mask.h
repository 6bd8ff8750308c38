// Which keys rows see, said of blocks of rows and keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace jax_gluon {

struct AttentionCall;

// Blocks of one (batch, head). A number of the index says that each row sees none or all of the
// keys, or which tile of bits has them, the first key in a byte's lowest bit.
struct MaskBlocks {
  static constexpr int32_t kNone = 0, kAll = 1, kFirstTile = 2;

  const int32_t* index;  // [rows / block][columns]
  const uint8_t* tiles;  // [tiles][block][block / 8]
  int64_t block, columns;

  int32_t number(int64_t row, int64_t column) const {
    return index[row / block * columns + column];
  }
  // The bits of a row in the block of keys `column`, whose number is of a tile.
  const uint8_t* bits(int64_t row, int64_t column) const {
    const int64_t tile = number(row, column) - kFirstTile;
    return tiles + (tile * block + row % block) * (block / 8);
  }
  // 1 for each of the keys [begin, end) that a row sees, else 0.
  void read(int64_t row, int64_t begin, int64_t end, uint8_t* out) const;
};

// Optional, in place of a mask. Rows and keys are in whole blocks, those past the last hidden.
struct BlockMask {
  const int32_t* index = nullptr;        // [B, N, rows / block, columns], dense
  std::vector<int64_t> index_offset;     // as Operand::batch_offset
  int64_t head_stride = 0, columns = 0;  // of the index
  const uint8_t* tiles = nullptr;
  std::vector<int64_t> tile_offset;  // where the tiles of each batch entry start
  int64_t block = 0;                 // a multiple of 16

  explicit operator bool() const { return index != nullptr; }
  MaskBlocks of(int64_t b, int64_t n) const {
    const auto entry = static_cast<size_t>(b);
    return {index + index_offset[entry] + n * head_stride, tiles + tile_offset[entry], block,
            columns};
  }
};

// `call` with its block mask as a mask of bytes, which `bytes` holds: once for all entries and
// heads that share it.
void expand_block_mask(AttentionCall& call, std::vector<uint8_t>& bytes);

}  // namespace jax_gluon
