// Which probabilities of a head dropout keeps: the bits of jax_gluon/_dropout.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention_call.h"
#include "cpu/memory/buffer.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

// Philox4x32-7 (Salmon et al., SC 2011): of counter (8 (j / 64) + j % 8, row, head, batch entry) it
// gives eight numbers of 16 bits, those of the keys that share j / 64 and j % 8.
template <class Isa>
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
    head_ = static_cast<uint32_t>(seeds[3]) +
            static_cast<uint32_t>(n) * static_cast<uint32_t>(seeds[4]);
    // No index is negative; a number that is counts from 2^31 on.
    first_row_ = static_cast<uint32_t>(seeds[5]);
    first_key_ = static_cast<uint32_t>(seeds[6]);
  }

  // Bytes that `find` needs for this many keys.
  static constexpr int64_t bytes(int64_t keys) { return keys + (kTiles + 1) * kTile; }

  bool any() const { return threshold_ != 0; }
  // What kept probabilities are multiplied by.
  float scale() const { return scale_; }

  // Of row i and the keys from `begin` on: 1 where kept. Written to `scratch`, into which the
  // result points.
  const uint8_t* find(int64_t i, int64_t begin, int64_t end, uint8_t* scratch) const {
    i += first_row_;
    begin += first_key_;
    end += first_key_;
    const int64_t first = begin / kTile * kTile;
    for (int64_t j = first; j < end; j += kTiles * kTile) {
      find_tiles(static_cast<uint32_t>(i), static_cast<uint32_t>(j / kTile), scratch + (j - first));
    }
    return scratch + (begin - first);
  }

 private:
  // Vectors at a time: more fill the time that products take.
  static constexpr int W = Isa::kLanes, kVectors = 2, kTiles = kVectors * W / kLanes;
  static_assert(kTiles >= 1 && (W % kLanes == 0 || W == kLanes / 2));
  using I = typename Isa::I;

  static I set(uint32_t x) { return Isa::set1_i32(static_cast<int32_t>(x)); }

  // Of kTiles tiles.
  void find_tiles(uint32_t i, uint32_t tile, uint8_t* out) const {
    alignas(kAlignment) int32_t counter[W];
    for (int l = 0; l < W; ++l) counter[l] = l;
    I x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t first = tile * kLanes + static_cast<uint32_t>(v * W);
      x0[v] = Isa::add_i32(Isa::load_i32(counter), set(first));
      x1[v] = set(i);
      x2[v] = set(head_);
      x3[v] = set(batch_);
    }
    uint32_t key0 = key_[0], key1 = key_[1];
    JAX_GLUON_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        I low0, high0, low1, high1;
        Isa::multiply_wide(x0[v], 0xD2511F53, &low0, &high0);
        Isa::multiply_wide(x2[v], 0xCD9E8D57, &low1, &high1);
        x0[v] = Isa::xor_i32(Isa::xor_i32(high1, x1[v]), set(key0));
        x1[v] = low1;
        x2[v] = Isa::xor_i32(Isa::xor_i32(high0, x3[v]), set(key1));
        x3[v] = low0;
      }
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    for (int v = 0; v < kVectors; ++v) {
      uint8_t* at = out + v * W / kLanes * kTile + v * W % kLanes;
      Isa::store_kept(at, x0[v], threshold_);
      Isa::store_kept(at + 16, x1[v], threshold_);
      Isa::store_kept(at + 32, x2[v], threshold_);
      Isa::store_kept(at + 48, x3[v], threshold_);
    }
  }

  uint32_t threshold_;
  float scale_;
  uint32_t key_[2] = {}, batch_ = 0, head_ = 0;
  int64_t first_row_ = 0, first_key_ = 0;
};

// Zeros the elements of a row that are not kept; of floats, whole vectors of them.
template <class Isa, class Element>
void zero_dropped(const uint8_t* keep, int64_t count, Element* row) {
  if constexpr (std::is_same_v<Element, float>) {
    for (int64_t j = 0; j < count; j += Isa::kLanes) {
      Isa::store(row + j, Isa::where_visible(keep + j, Isa::load(row + j), Isa::zero()));
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      row[j] &= static_cast<Element>(-static_cast<int>(keep[j]));
    }
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
