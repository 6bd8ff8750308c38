#include "ffi/block_mask_reader.h"

#include <string>
#include <vector>

#include "numerics.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

void read_block_mask(BufferReader& reader, int64_t block, int64_t batch, AttentionCall& call) {
  BlockMask& mask = call.block_mask;
  if (block % 16 != 0) {
    reader.fail("attribute mask_block is " + std::to_string(block) + ", expected a multiple of 16");
  }
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  Shape found;
  const Shape blocks = {batch, call.N, blocks_of(call.T, block), blocks_of(call.S, block)};
  mask.index =
      static_cast<const int32_t*>(reader.operand("mask_index", blocks, true, {ffi::DataType::S32},
                                                 &dtype, &mask.index_offset, &strides, &found));
  if (reader.failed()) return;
  if (found[2] != blocks[2] || found[3] != blocks[3]) {
    reader.fail("operand mask_index has shape " + to_string(found) + ", expected " +
                to_string(blocks) + ", or 1 on the first two axes");
    return;
  }
  mask.head_stride = strides[0];
  mask.columns = blocks[3];
  mask.block = block;
  const int64_t count = reader.peek_shape(0, "mask_tiles", 4)[1];
  mask.tiles = static_cast<const uint8_t*>(
      reader.operand("mask_tiles", {batch, count, block, block / 8}, true, {ffi::DataType::U8},
                     &dtype, &mask.tile_offset, &strides, &found));
  if (reader.failed()) return;
  if (found[2] != block || found[3] != block / 8) {
    reader.fail("operand mask_tiles has shape " + to_string(found) + ", expected tiles of [" +
                std::to_string(block) + ", " + std::to_string(block / 8) + "]");
    return;
  }
  const int64_t last = MaskBlocks::kFirstTile + count;
  for (int64_t b = 0; b < call.B; ++b) {
    const auto entry = static_cast<size_t>(b);
    if (b > 0 && mask.index_offset[entry] == mask.index_offset[entry - 1]) continue;
    for (int64_t n = 0; n < (mask.head_stride == 0 ? 1 : call.N); ++n) {
      const int32_t* index = mask.of(b, n).index;
      for (int64_t at = 0; at < blocks[2] * blocks[3]; ++at) {
        if (index[at] >= 0 && index[at] < last) continue;
        reader.fail("operand mask_index has " + std::to_string(index[at]) + ", expected 0 to " +
                    std::to_string(last - 1));
        return;
      }
    }
  }
}

}  // namespace jax_gluon
