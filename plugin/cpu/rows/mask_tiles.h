// Which tiles of a mask show keys: found once a call, so that kernels skip what nobody sees, and
// don't test what everybody sees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention_call.h"
#include "cpu/memory/buffer.h"
#include "cpu/rows/visibility.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// The tiles of one (batch, head): a bit for each kKeys keys, in words for each band of kRows rows.
class MaskPlane {
 public:
  static constexpr int64_t kRows = 4, kKeys = 16, kWordTiles = 64;

  MaskPlane() = default;
  MaskPlane(const uint64_t* visible, const uint64_t* hidden, int64_t band_words)
      : visible_(visible), hidden_(hidden), band_words_(band_words) {}

  explicit operator bool() const { return visible_ != nullptr; }

  // The first of `keys` that any of the rows may see, and those after it up to the first that none
  // does: whole tiles of `step` keys, counted from key 0, within `keys`.
  Range first_run(Range rows, Range keys, int64_t step) const {
    const int64_t size = std::max<int64_t>(step / kKeys, 1), end = ceil_div(keys.end, kKeys);
    const int64_t first = find<true>(rows, keys.begin / kKeys / size * size, end, size);
    const int64_t last = find<false>(rows, first, end, size);
    return intersect({first * kKeys, last * kKeys}, keys);
  }
  // From the first to the last of `keys` that any of the rows may see.
  Range seen(Range rows, Range keys) const {
    Range all = first_run(rows, keys, kKeys);
    for (Range run = all; !run.empty(); run = first_run(rows, {run.end, keys.end}, kKeys)) {
      all.end = run.end;
    }
    return all;
  }
  // Whether the mask shows all of `keys` to all of the rows; may be false where it does.
  bool shows_all(Range rows, Range keys) const {
    const int64_t end = ceil_div(keys.end, kKeys);
    for (int64_t tile = keys.begin / kKeys; tile < end; tile += kWordTiles) {
      const uint64_t beyond = end - tile < kWordTiles ? ~uint64_t{0} << (end - tile) : 0;
      if (window(hidden_, rows, tile) & ~beyond) return false;
    }
    return true;
  }

 private:
  // The first tile from `tile` on whose step, `size` tiles, is seen or not; else `end`.
  template <bool kSeen>
  int64_t find(Range rows, int64_t tile, int64_t end, int64_t size) const {
    for (; tile < end; tile += kWordTiles) {
      uint64_t x = window(visible_, rows, tile);
      if (size > 1) x = (x | x >> 1) & 0x5555555555555555u;
      if (size > 2) x = (x | x >> 2) & 0x1111111111111111u;
      x *= (uint64_t{1} << size) - 1;
      if (!kSeen) x = ~x;
      if (x) return std::min(end, tile + __builtin_ctzll(x));
    }
    return end;
  }

  // The bits of any of the rows, of the tiles from `tile` on.
  uint64_t window(const uint64_t* bits, Range rows, int64_t tile) const {
    const int64_t shift = tile % kWordTiles;
    const int64_t first = band_words_ == 0 ? 0 : rows.begin / kRows;
    const int64_t last = band_words_ == 0 ? 1 : ceil_div(rows.end, kRows);
    uint64_t low = 0, high = 0;
    for (int64_t band = first; band < last; ++band) {
      const uint64_t* at = bits + band * band_words_ + tile / kWordTiles;
      low |= at[0];
      high |= at[1];
    }
    return shift == 0 ? low : low >> shift | high << (kWordTiles - shift);
  }

  const uint64_t* visible_ = nullptr;
  const uint64_t* hidden_ = nullptr;
  int64_t band_words_ = 0;  // 0: all rows share a band
};

// The planes of a call's mask, each once, however many batch entries and heads share it.
class MaskTiles {
  static constexpr int64_t kRows = MaskPlane::kRows, kKeys = MaskPlane::kKeys;
  static constexpr int64_t kWordTiles = MaskPlane::kWordTiles;
  static constexpr int64_t kTaskBands = 32;

 public:
  explicit MaskTiles(const AttentionCall& call)
      : call_(call),
        has_one_row_(call.mask && call.mask_stride[1] == 0),
        bands_(has_one_row_ ? 1 : ceil_div(call.T, kRows)),
        // One more, which is read with the last.
        band_words_(ceil_div(call.S, kKeys * kWordTiles) + 1) {}

  void find(Parallel& parallel) {
    if (!call_.has_mask()) return;
    const int64_t heads = call_.B * call_.N;
    int64_t planes = 0;
    for (int64_t bn = 0; bn < heads; ++bn) planes = std::max(planes, index_of(bn) + 1);
    // A head that has each plane.
    Buffer<int64_t> owners(planes);
    for (int64_t bn = 0; bn < heads; ++bn) owners[index_of(bn)] = bn;
    visible_.allocate(planes * bands_ * band_words_);
    hidden_.allocate(planes * bands_ * band_words_);
    const int64_t tasks = ceil_div(bands_, kTaskBands);
    parallel.run(planes * tasks, [&](int64_t task) {
      const int64_t plane = task / tasks, bn = owners[plane];
      const int64_t first = task % tasks * kTaskBands;
      for (int64_t band = first; band < std::min(first + kTaskBands, bands_); ++band) {
        find_band(bn / call_.N, bn % call_.N, band, (plane * bands_ + band) * band_words_);
      }
    });
  }

  // False where there is no mask.
  MaskPlane plane(int64_t b, int64_t n) const {
    if (!call_.has_mask()) return {};
    const int64_t at = plane_index(b, n) * bands_ * band_words_;
    return {visible_.get() + at, hidden_.get() + at, has_one_row_ ? 0 : band_words_};
  }

 private:
  int64_t index_of(int64_t bn) const { return plane_index(bn / call_.N, bn % call_.N); }

  // Masks are dense: their planes are numbered by where they start. Strides count an axis without
  // keys as one.
  int64_t plane_index(int64_t b, int64_t n) const {
    const auto entry = static_cast<size_t>(b);
    if (call_.mask) {
      const int64_t keys = call_.mask_stride[2] == 0 ? 1 : std::max<int64_t>(call_.S, 1);
      const int64_t size = (has_one_row_ ? 1 : call_.T) * keys;
      return (call_.mask_batch_offset[entry] + n * call_.mask_stride[0]) /
             std::max<int64_t>(size, 1);
    }
    const BlockMask& mask = call_.block_mask;
    // An index that vmap did not map may have tiles that it did.
    if (mask.tile_offset.front() != mask.tile_offset.back()) return b * call_.N + n;
    return (mask.index_offset[entry] + n * mask.head_stride) /
           std::max<int64_t>(ceil_div(call_.T, mask.block) * std::max<int64_t>(mask.columns, 1), 1);
  }

  // Eight bytes of a mask, each 1 where it shows its key; or bits of as many bytes.
  static constexpr uint64_t kOnes = 0x0101010101010101u;
  struct Tile {
    uint64_t any = 0, all = ~uint64_t{0};
    void take(uint64_t x) {
      any |= x;
      all &= x;
    }
  };

  // Writes the words of a band to `at`.
  void find_band(int64_t b, int64_t n, int64_t band, int64_t at) const {
    const Range rows{band * kRows, has_one_row_ ? 1 : std::min((band + 1) * kRows, call_.T)};
    std::fill(visible_.get() + at, visible_.get() + at + band_words_, uint64_t{0});
    std::fill(hidden_.get() + at, hidden_.get() + at + band_words_, uint64_t{0});
    if (call_.block_mask) {
      find_blocks(call_.block_mask.of(b, n), rows, at);
      return;
    }
    const uint8_t* plane =
        call_.mask + call_.mask_batch_offset[static_cast<size_t>(b)] + n * call_.mask_stride[0];
    const int64_t word_keys = kWordTiles * kKeys;
    for (int64_t key = 0; key < call_.S; key += word_keys) {
      Tile tiles[kWordTiles];
      const Range keys{key, std::min(key + word_keys, call_.S)};
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        read(plane + i * call_.mask_stride[1], keys, tiles);
      }
      for (int64_t t = 0; t < ceil_div(keys.end - key, kKeys); ++t) {
        set(at, key / kKeys + t, tiles[t].any != 0, (tiles[t].all & kOnes) != kOnes);
      }
    }
  }

  void read(const uint8_t* row, Range keys, Tile* tiles) const {
    int64_t j = keys.begin;
    if (call_.mask_stride[2] == 0) {
      for (; j < keys.end; j += kKeys) (tiles++)->take(row[0] * kOnes);
      return;
    }
    for (; j + kKeys <= keys.end; j += kKeys, ++tiles) {
      uint64_t halves[2];
      static_assert(sizeof(halves) == kKeys);
      std::memcpy(halves, row + j, sizeof(halves));
      tiles->any |= halves[0] | halves[1];
      tiles->all &= halves[0] & halves[1];
    }
    for (; j < keys.end; ++j) tiles->take(row[j] * kOnes);
  }

  void find_blocks(const MaskBlocks& blocks, Range rows, int64_t at) const {
    static_assert(kKeys == 16, "two bytes of bits");
    const int64_t block_tiles = blocks.block / kKeys, tiles = ceil_div(call_.S, kKeys);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t column = t / block_tiles;
      const int32_t number = blocks.number(rows.begin, column);
      if (number < MaskBlocks::kFirstTile) {
        set(at, t, number == MaskBlocks::kAll, number != MaskBlocks::kAll);
        continue;
      }
      Tile tile;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        uint16_t bits;
        std::memcpy(&bits, blocks.bits(i, column) + t % block_tiles * sizeof(bits), sizeof(bits));
        tile.take(bits);
      }
      set(at, t, tile.any != 0, tile.all != 0xFFFF);
    }
  }

  void set(int64_t at, int64_t tile, bool visible, bool hidden) const {
    const int64_t word = at + tile / kWordTiles, bit = tile % kWordTiles;
    visible_[word] |= uint64_t{visible} << bit;
    hidden_[word] |= uint64_t{hidden} << bit;
  }

  const AttentionCall& call_;
  const bool has_one_row_;
  const int64_t bands_, band_words_;
  Buffer<uint64_t> visible_, hidden_;  // [planes][bands][band words]
};

}  // namespace
}  // namespace jax_gluon::cpu
