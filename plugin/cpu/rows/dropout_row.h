// Which probabilities of a head dropout keeps: the bits of jax_gluon/_dropout.py.
#pragma once

#include <cstdint>

#include "attention_call.h"
#include "cpu/memory/buffer.h"

namespace jax_gluon::cpu {
namespace {

// Philox4x32-7 (Salmon et al., SC 2011): of counter (8 (j / 64) + j % 8, row, head, batch entry) it
// gives eight numbers of 16 bits, those of the keys that share j / 64 and j % 8.
class DropoutRow {
  static constexpr int kLanes = 8, kSlots = 8, kTile = kLanes * kSlots, kRounds = 7;

 public:
  DropoutRow(const AttentionCall& call, int64_t b, int64_t n)
      : threshold_(call.dropout.threshold), scale_(call.dropout.scale) {
    if (threshold_ == 0) return;
    const int32_t* seeds =
        call.dropout.seeds.data + call.dropout.seeds.batch_offset[static_cast<size_t>(b)];
    for (int i = 0; i < 2; ++i) key_[i] = static_cast<uint32_t>(seeds[i]);
    batch_ = static_cast<uint32_t>(seeds[2]);
    head_ = static_cast<uint32_t>(n) * static_cast<uint32_t>(seeds[3]);
  }

  // Bytes that `find` needs for this many keys.
  static constexpr int64_t bytes(int64_t keys) { return keys + 2 * kTile; }

  bool any() const { return threshold_ != 0; }
  // What kept probabilities are multiplied by.
  float scale() const { return scale_; }

  // Of row i and the keys from `begin` on: 1 where kept. Written to `scratch`, into which the
  // result points.
  const uint8_t* find(int64_t i, int64_t begin, int64_t end, uint8_t* scratch) const {
    const int64_t first = begin / kTile * kTile;
    for (int64_t j = first; j < end; j += kTile) {
      find_tile(static_cast<uint32_t>(i), static_cast<uint32_t>(j / kTile), scratch + (j - first));
    }
    return scratch + (begin - first);
  }

 private:
  void find_tile(uint32_t i, uint32_t tile, uint8_t* out) const {
    uint32_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) {
      x0[l] = tile * kLanes + l;
      x1[l] = i;
      x2[l] = head_;
      x3[l] = batch_;
    }
    uint32_t key0 = key_[0], key1 = key_[1];
    for (int round = 0; round < kRounds; ++round) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t a = uint64_t{0xD2511F53} * x0[l], b = uint64_t{0xCD9E8D57} * x2[l];
        x0[l] = static_cast<uint32_t>(b >> 32) ^ x1[l] ^ key0;
        x1[l] = static_cast<uint32_t>(b);
        x2[l] = static_cast<uint32_t>(a >> 32) ^ x3[l] ^ key1;
        x3[l] = static_cast<uint32_t>(a);
      }
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    const uint32_t* words[4] = {x0, x1, x2, x3};
    for (int w = 0; w < 4; ++w) {
      for (int l = 0; l < kLanes; ++l) {
        out[16 * w + l] = (words[w][l] & 0xFFFF) >= threshold_;
        out[16 * w + 8 + l] = words[w][l] >> 16 >= threshold_;
      }
    }
  }

  uint32_t threshold_;
  float scale_;
  uint32_t key_[2] = {}, batch_ = 0, head_ = 0;
};

// Zeros the elements of a row that are not kept.
template <class Element>
void zero_dropped(const uint8_t* keep, int64_t count, Element* row) {
  for (int64_t j = 0; j < count; ++j) row[j] = keep[j] ? row[j] : Element(0);
}

}  // namespace
}  // namespace jax_gluon::cpu
