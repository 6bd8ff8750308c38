#include "block_mask.h"

#include <algorithm>
#include <cstring>

#include "attention_call.h"

namespace jax_gluon {

void MaskBlocks::read(int64_t row, int64_t begin, int64_t end, uint8_t* out) const {
  for (int64_t j = begin; j < end;) {
    const int64_t column = j / block, first = column * block, last = std::min(end, first + block);
    const int32_t seen = number(row, column);
    if (seen < kFirstTile) {
      std::memset(out + (j - begin), seen == kAll, static_cast<size_t>(last - j));
      j = last;
      continue;
    }
    const uint8_t* byte = bits(row, column);
    while (j < last) {
      const int64_t bit = j - first;
      if (bit % 8 == 0 && j + 8 <= last) {
        constexpr uint64_t kOnes = 0x0101010101010101u, kLow = 0x7f * kOnes;
        // Bit i alone in byte i, then moved to its lowest bit.
        const uint64_t each = byte[bit / 8] * kOnes & 0x8040201008040201u;
        const uint64_t bytes = (each + kLow) >> 7 & kOnes;
        std::memcpy(out + (j - begin), &bytes, sizeof(bytes));
        j += 8;
      } else {
        out[j - begin] = byte[bit / 8] >> (bit % 8) & 1;
        ++j;
      }
    }
  }
}

void expand_block_mask(AttentionCall& call, std::vector<uint8_t>& bytes) {
  const BlockMask& mask = call.block_mask;
  const int64_t heads = mask.head_stride == 0 ? 1 : call.N, plane = call.T * call.S;
  bytes.clear();
  call.mask_batch_offset.resize(static_cast<size_t>(call.B));
  for (int64_t b = 0; b < call.B; ++b) {
    const auto entry = static_cast<size_t>(b);
    if (entry > 0 && mask.index_offset[entry] == mask.index_offset[entry - 1] &&
        mask.tile_offset[entry] == mask.tile_offset[entry - 1]) {
      call.mask_batch_offset[entry] = call.mask_batch_offset[entry - 1];
      continue;
    }
    const size_t start = bytes.size();
    call.mask_batch_offset[entry] = static_cast<int64_t>(start);
    bytes.resize(start + static_cast<size_t>(heads * plane));
    for (int64_t n = 0; n < heads; ++n) {
      const MaskBlocks blocks = mask.of(b, n);
      for (int64_t i = 0; i < call.T; ++i) {
        blocks.read(i, 0, call.S, bytes.data() + start + n * plane + i * call.S);
      }
    }
  }
  call.mask = bytes.data();
  call.mask_stride[0] = heads == 1 ? 0 : plane;
  call.mask_stride[1] = call.S;
  call.mask_stride[2] = 1;
  call.block_mask = {};
}

}  // namespace jax_gluon
