// Blocks of keys and values of a forward pass, packed.
#pragma once

#include <algorithm>

#include "cpu/forward/folded_values.h"
#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/key_value_rows.h"
#include "cpu/memory/buffer.h"
#include "cpu/rows/logit_rules.h"
#include "cpu/tiles/pack.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// INT8: what a kv head's keys from some key on have beside their codes.
struct KeyScales {
  const float* scale = nullptr;
  // log2 of the value scale that the key's probability folds in (in units of the head's), and that
  // value scale's reciprocal.
  const float* fold_log2 = nullptr;
  const float* fold_inverse = nullptr;
  // Where keys or queries have offsets: the key's, and its scale times the sum of its codes.
  const float* offset = nullptr;
  const float* code_sum = nullptr;
  // Where values have offsets.
  const float* value_offset = nullptr;
};

// Slots for packed keys and values, each of as many keys. A kernel that packs everything once has a
// slot for every kv head; one that fills blocks as it goes, a few.
template <class Core>
class PackedKeyValues {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  using Scratch = RowScratch<Core>;
  static constexpr int C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kStep = ForwardBlocks<Core>::kStep;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;

 public:
  PackedKeyValues(const AttentionForwardCall& call, const KeyValueRows<Core>& key_values)
      : call_(call),
        key_values_(key_values),
        head_lanes_(row_lanes<Core>(call.H)),
        value_panels_(ceil_div(call.V, C)) {}

  // `keys` is a multiple of kStep.
  void allocate(int64_t slots, int64_t keys) {
    slot_keys_ = keys;
    packed_keys_.allocate(slots * keys * head_lanes_);
    packed_values_.allocate(slots * keys / G * value_panels_ * C);
    has_zeros_.allocate(slots * keys);
    if constexpr (kInt8) {
      row_scales_.allocate(slots * keys * 3);
      if (key_values_.has_offsets()) key_offsets_.allocate(slots * keys * 2);
      if (key_values_.has_value_offsets()) value_offsets_.allocate(slots * keys);
    }
  }

  // Packs all keys, those of a kv head in the slot of its number.
  void pack_all(Parallel& parallel) {
    const int64_t blocks = ceil_div(call_.S, kBlockKeys);
    allocate(call_.B * call_.K, blocks * kBlockKeys);
    ScratchPool<Scratch> scratch(parallel.threads());
    parallel.run(call_.B * call_.K * blocks, [&](int64_t task) {
      auto lease = scratch.acquire();
      lease->prepare(call_);
      const int64_t head = task / blocks, begin = task % blocks * kBlockKeys;
      pack(head, {begin, begin + kBlockKeys}, {head, 0}, *lease);
    });
  }

  // Where a kv head's keys are packed: key j is number j - first of the slot.
  struct Place {
    int64_t slot, first;
  };

  // Packs keys of kv head `head`, a whole number of steps. Rows of V that are not finite are packed
  // as zeros: where a row does see such a key they are added exactly, and where it does
  // not they can't leak (0 * NaN).
  void pack(int64_t head, Range keys, Place to, Scratch& s) {
    const int64_t b = head / call_.K, k = head % call_.K, begin = keys.begin;
    // Of what no row sees, only the rest of a block is packed.
    const Range seen = Visibility(call_, b).keys();
    const int64_t end = std::min(seen.end, keys.end);
    if (begin >= end || seen.empty() || keys.end <= seen.begin) return;
    touch_rows(call_.key, b, begin, end, k, call_.H);
    touch_rows(call_.value, b, begin, end, k, call_.V);
    pack_score_panels<Core>(begin, end, call_.H, s.rows.get(),
                            key_panels(to.slot, begin - to.first),
                            [&](int64_t j, Lane* out) { load_key(to, b, j, k, s, out); });
    // Panels beyond the last key are read only up to the rounded end of the block's visible range.
    const int64_t packed = begin + round_up(end - begin, C),
                  last = begin + round_up(end - begin, kStep);
    std::fill(key_panels(to.slot, packed - to.first), key_panels(to.slot, last - to.first),
              Lane(0));

    uint8_t* zeros = has_zeros(to.slot) + begin - to.first;
    std::fill(zeros, zeros + last - begin, uint8_t(0));
    if constexpr (kInt8) {
      for (int64_t j = begin; j < last; j += kSubtileKeys) {
        pack_subtile_of_values(to, head, j, end, s, zeros + j - begin);
      }
    } else {
      for (int64_t j = begin; j < last; j += G) {
        pack_values(b, k, j, end, s, zeros + j - begin, value_lines(to.slot, j - to.first));
      }
    }
  }

  Lane* key_panels(int64_t slot, int64_t key) const {
    return packed_keys_.get() + (slot * slot_keys_ + key) * head_lanes_;
  }
  // Line of value panel 0 that holds `key`; panels are value_panel_stride() apart.
  Lane* value_lines(int64_t slot, int64_t key) const {
    return packed_values_.get() + slot * value_panel_stride() * value_panels_ + key / G * C;
  }
  int64_t value_panel_stride() const { return slot_keys_ / G * C; }
  // INT8: those of the keys from `key` on.
  KeyScales key_scales(int64_t slot, int64_t key) const {
    KeyScales out;
    out.scale = scale_of_key(slot) + key;
    out.fold_log2 = fold_log2(slot) + key;
    out.fold_inverse = fold_inverse(slot) + key;
    if (key_values_.has_offsets()) {
      out.offset = key_offsets(slot) + key;
      out.code_sum = key_code_sums(slot) + key;
    }
    if (key_values_.has_value_offsets()) out.value_offset = value_offsets(slot) + key;
    return out;
  }
  // Of each key: whether its value row is packed as zeros, because it is not finite.
  uint8_t* has_zeros(int64_t slot) const { return has_zeros_.get() + slot * slot_keys_; }

 private:
  float* scale_of_key(int64_t slot) const { return row_scales_.get() + slot * slot_keys_ * 3; }
  float* fold_log2(int64_t slot) const { return scale_of_key(slot) + slot_keys_; }
  float* fold_inverse(int64_t slot) const { return fold_log2(slot) + slot_keys_; }
  float* key_offsets(int64_t slot) const { return key_offsets_.get() + slot * slot_keys_ * 2; }
  float* key_code_sums(int64_t slot) const { return key_offsets(slot) + slot_keys_; }
  float* value_offsets(int64_t slot) const { return value_offsets_.get() + slot * slot_keys_; }

  // A key row as lanes; for INT8 also its scale, and what its offset adds to logits.
  void load_key(Place to, int64_t b, int64_t j, int64_t k, Scratch& s, Lane* out) {
    if constexpr (kInt8) {
      const auto [codes, scale] = key_values_.keys().codes_of(b, j, k, s.row.get(), s.codes.get());
      row_to_lanes<Core>(codes, DType::kS8, call_.H, Core::kKeyBias, out);
      const int64_t at = j - to.first;
      scale_of_key(to.slot)[at] = scale.scale;
      if (key_values_.has_offsets()) {
        key_offsets(to.slot)[at] = scale.offset;
        key_code_sums(to.slot)[at] = scale.scale * static_cast<float>(sum_of(codes, call_.H));
      }
    } else if constexpr (kBf16) {
      row_to_lanes<Core>(row_of(call_.key, b, j, k), call_.key.dtype, call_.H, 0, out);
    } else {
      key_values_.keys().load(b, j, k, out);
    }
  }

  void pack_values(int64_t b, int64_t k, int64_t j, int64_t end, Scratch& s, uint8_t* zeros,
                   Lane* line) {
    if constexpr (kBf16) {
      const uint16_t* rows[G];
      for (int g = 0; g < G; ++g) {
        rows[g] = nullptr;
        if (j + g >= end) continue;
        const void* source = row_of(call_.value, b, j + g, k);
        load_row<Isa>(source, call_.value.dtype, call_.V, s.row.get());
        zeros[g] = !all_finite<Isa>(s.row.get(), call_.V);
        if (!zeros[g]) rows[g] = static_cast<const uint16_t*>(source);
      }
      pack_value_line<Core, uint16_t>(rows, call_.V, line, value_panel_stride());
    } else {
      const float* rows[1] = {nullptr};
      if (j < end) {
        key_values_.values().load(b, j, k, s.row.get());
        zeros[0] = !all_finite<Isa>(s.row.get(), call_.V);
        if (!zeros[0]) rows[0] = s.row.get();
      }
      pack_value_line<Core, float>(rows, call_.V, line, value_panel_stride());
    }
  }

  // INT8.
  void pack_subtile_of_values(Place to, int64_t head, int64_t j0, int64_t end, Scratch& s,
                              uint8_t* zeros) {
    const int64_t at = j0 - to.first;
    FoldedValues values;
    load_folded_values(key_values_, call_, head, j0, end, s, values);
    std::copy(values.has_zeros, values.has_zeros + kSubtileKeys, zeros);
    std::copy(values.fold_log2, values.fold_log2 + kSubtileKeys, fold_log2(to.slot) + at);
    std::copy(values.fold_inverse, values.fold_inverse + kSubtileKeys, fold_inverse(to.slot) + at);
    if (key_values_.has_value_offsets()) {
      std::copy(values.offset, values.offset + kSubtileKeys, value_offsets(to.slot) + at);
    }
    for (int64_t c = std::max<int64_t>(end - j0, 0); c < kSubtileKeys; ++c) {
      scale_of_key(to.slot)[at + c] = 0.0f;
      if (key_values_.has_offsets()) {
        key_offsets(to.slot)[at + c] = key_code_sums(to.slot)[at + c] = 0.0f;
      }
    }
    for (int64_t c = 0; c < kSubtileKeys; c += G) {
      pack_value_line<Core, int8_t>(values.rows + c, call_.V, value_lines(to.slot, at + c),
                                    value_panel_stride());
    }
  }

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& key_values_;
  const int64_t head_lanes_, value_panels_;
  int64_t slot_keys_ = 0;
  Buffer<Lane> packed_keys_, packed_values_;
  // INT8, of each slot: scales, logarithms and reciprocals; offsets and sums of codes.
  Buffer<float> row_scales_, key_offsets_, value_offsets_;
  Buffer<uint8_t> has_zeros_;
};

}  // namespace
}  // namespace jax_gluon::cpu
