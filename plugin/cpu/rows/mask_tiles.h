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
        rows_(call.mask_stride[1] == 0 ? 1 : call.T),
        plane_bytes_(std::max<int64_t>(rows_ * (call.mask_stride[2] == 0 ? 1 : call.S), 1)),
        bands_(ceil_div(rows_, kRows)),
        // One more, which is read with the last.
        band_words_(ceil_div(call.S, kKeys * kWordTiles) + 1) {}

  void find(Parallel& parallel) {
    if (!call_.mask) return;
    int64_t planes = 0;
    for (int64_t b = 0; b < call_.B; ++b) {
      planes = std::max(planes, plane_index(b, call_.N - 1) + 1);
    }
    visible_.allocate(planes * bands_ * band_words_);
    hidden_.allocate(planes * bands_ * band_words_);
    const int64_t tasks = ceil_div(bands_, kTaskBands);
    parallel.run(planes * tasks, [this, tasks](int64_t task) {
      const int64_t first = task % tasks * kTaskBands;
      for (int64_t band = first; band < std::min(first + kTaskBands, bands_); ++band) {
        find_band(task / tasks, band);
      }
    });
  }

  // False where there is no mask.
  MaskPlane plane(int64_t b, int64_t n) const {
    if (!call_.mask) return {};
    const int64_t at = plane_index(b, n) * bands_ * band_words_;
    return {visible_.get() + at, hidden_.get() + at, call_.mask_stride[1] == 0 ? 0 : band_words_};
  }

 private:
  int64_t plane_index(int64_t b, int64_t n) const {
    return (call_.mask_batch_offset[static_cast<size_t>(b)] + n * call_.mask_stride[0]) /
           plane_bytes_;
  }

  void find_band(int64_t plane, int64_t band) const {
    const int64_t at = (plane * bands_ + band) * band_words_;
    const int64_t count = std::min(kRows, rows_ - band * kRows);
    const uint8_t* rows = call_.mask + plane * plane_bytes_ + band * kRows * call_.mask_stride[1];
    for (int64_t w = 0; w < band_words_; ++w) {
      Bytes tiles[kWordTiles];
      const Range keys{w * kWordTiles * kKeys, std::min((w + 1) * kWordTiles * kKeys, call_.S)};
      for (int64_t r = 0; r < count; ++r) read(rows + r * call_.mask_stride[1], keys, tiles);
      uint64_t visible = 0, hidden = 0;
      for (int64_t t = 0; t < kWordTiles; ++t) {
        visible |= uint64_t{tiles[t].any != 0} << t;
        hidden |= uint64_t{tiles[t].all != kOnes} << t;
      }
      visible_[at + w] = visible;
      hidden_[at + w] = hidden;
    }
  }

  // Eight bytes of a mask, each 1 where it shows its key.
  static constexpr uint64_t kOnes = 0x0101010101010101u;
  struct Bytes {
    uint64_t any = 0, all = kOnes;
    void take(uint64_t x) {
      any |= x;
      all &= x;
    }
  };

  void read(const uint8_t* row, Range keys, Bytes* tiles) const {
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

  const AttentionCall& call_;
  const int64_t rows_, plane_bytes_, bands_, band_words_;
  Buffer<uint64_t> visible_, hidden_;  // [planes][bands][band words]
};

}  // namespace
}  // namespace jax_gluon::cpu
