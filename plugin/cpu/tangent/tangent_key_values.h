// Keys and values of kv heads beside their tangents, packed so that each pair shares its products.
#pragma once

#include <algorithm>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/key_value_rows.h"
#include "cpu/memory/buffer.h"
#include "cpu/tiles/pack.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// A slot holds all keys of a kv head. Layouts, in floats, C = kTileColumns; what has no tangent has
// no room for it:
//   score panels  [keys / C][key, tangent][H][C]
//   value panels  [keys / kKeys][columns / C][tangent, value][kKeys][C]
template <class Isa>
class TangentKeyValues {
  using Core = F32Core<Isa>;
  static constexpr int64_t C = Core::kTileColumns;

 public:
  // Keys of a block, whose softmax is taken at once: with AVX2, scores of a group beside their
  // tangents (12 x 2 x 128 x 4 bytes) and a panel of values beside theirs (2 x 8 KiB) fit in L1.
  static constexpr int64_t kKeys = ForwardBlocks<Core>::kSubtileColumns;
  static_assert(kKeys % C == 0);

  struct Scratch {
    Buffer<float> panel;  // keys of a panel as rows
    Buffer<float> row, tangent_row;
  };

  TangentKeyValues(const AttentionTangentCall& call, const KeyValueRows<Core>& key_values)
      : call_(call),
        key_values_(key_values),
        blocks_(ceil_div(call.S, kKeys)),
        panel_(call.H * C * (call.key_tangent ? 2 : 1)),
        value_panel_(kKeys * C * (call.value_tangent ? 2 : 1)),
        value_panels_(ceil_div(call.V, C)) {}

  int64_t blocks() const { return blocks_; }
  // Floats of a slot.
  int64_t slot_size() const { return key_size() + value_size(); }

  void allocate(int64_t slots) {
    packed_keys_.allocate(slots * key_size());
    packed_values_.allocate(slots * value_size());
    has_zeros_.allocate(slots * blocks_ * kKeys);
  }

  // Packs a block of keys of kv head `head`. Where a row of values or of tangents is not finite,
  // both are packed as zeros: who sees such a key adds them exactly, who does not has no 0 * NaN.
  void pack(int64_t head, int64_t slot, int64_t block, Scratch& s) const {
    const int64_t b = head / call_.K, k = head % call_.K, H = call_.H, begin = block * kKeys;
    const Range seen = Visibility(call_, b).keys();
    const int64_t end = std::min(seen.end, begin + kKeys);
    if (begin >= end || seen.empty() || begin + kKeys <= seen.begin) return;
    s.panel.allocate(panel_);
    s.row.allocate(call_.V);
    s.tangent_row.allocate(call_.V);
    touch_rows(call_.key, b, begin, end, k, H);
    touch_rows(call_.value, b, begin, end, k, call_.V);
    if (call_.key_tangent) touch_rows(call_.key_tangent, b, begin, end, k, H);
    if (call_.value_tangent) touch_rows(call_.value_tangent, b, begin, end, k, call_.V);
    pack_score_panels<Core>(begin, end, panel_ / C, s.panel.get(), key_panels(slot, begin),
                            [&](int64_t j, float* out) {
                              key_values_.keys().load(b, j, k, out);
                              if (call_.key_tangent) load(call_.key_tangent, b, j, k, H, out + H);
                            });
    uint8_t* zeros = has_zeros(slot, begin);
    float* values = value_panel(slot, block, 0) + value_offset();
    for (int64_t j = begin; j < begin + round_up(end - begin, C); ++j, values += C) {
      zeros[j - begin] = j < end && !load_values(b, j, k, s);
      const float* none = nullptr;
      const bool is_zero = j >= end || zeros[j - begin] != 0;
      const float* row = is_zero ? none : s.row.get();
      pack_value_line<Core, float>(&row, call_.V, values, value_panel_);
      if (!call_.value_tangent) continue;
      row = is_zero ? none : s.tangent_row.get();
      pack_value_line<Core, float>(&row, call_.V, values - value_offset(), value_panel_);
    }
  }

  // The value row of a key, and its tangent; whether both are finite.
  bool load_values(int64_t b, int64_t j, int64_t k, Scratch& s) const {
    key_values_.values().load(b, j, k, s.row.get());
    bool finite = all_finite<Isa>(s.row.get(), call_.V);
    if (call_.value_tangent) {
      load(call_.value_tangent, b, j, k, call_.V, s.tangent_row.get());
      finite = finite && all_finite<Isa>(s.tangent_row.get(), call_.V);
    }
    return finite;
  }

  float* key_panels(int64_t slot, int64_t key) const {
    return packed_keys_.get() + slot * key_size() + key / C * panel_;
  }
  // Panel p of a block: its values stand value_offset() after their tangents.
  float* value_panel(int64_t slot, int64_t block, int64_t p) const {
    return packed_values_.get() + slot * value_size() + (block * value_panels_ + p) * value_panel_;
  }
  int64_t value_offset() const { return call_.value_tangent ? kKeys * C : 0; }
  // Of each key from `key` on: whether its values are packed as zeros.
  uint8_t* has_zeros(int64_t slot, int64_t key) const {
    return has_zeros_.get() + slot * blocks_ * kKeys + key;
  }

 private:
  static void load(const Operand& x, int64_t b, int64_t j, int64_t k, int64_t width, float* out) {
    load_row<Isa>(row_of(x, b, j, k), x.dtype, width, out);
  }
  int64_t key_size() const { return blocks_ * kKeys / C * panel_; }
  int64_t value_size() const { return blocks_ * value_panels_ * value_panel_; }

  const AttentionTangentCall& call_;
  const KeyValueRows<Core>& key_values_;
  const int64_t blocks_, panel_, value_panel_, value_panels_;
  Buffer<float> packed_keys_, packed_values_;
  Buffer<uint8_t> has_zeros_;
};

}  // namespace
}  // namespace jax_gluon::cpu
