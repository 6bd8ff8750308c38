// What the softmax of a forward pass works on: a group of query rows, and the keys of its scores.
#pragma once

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/packed_key_values.h"
#include "cpu/rows/dropout_row.h"
#include "cpu/rows/visibility.h"

namespace jax_gluon::cpu {
namespace {

// Per row of a block, base 2: the largest logit so far, the sum of probabilities relative to it,
// the factor of its integer or unscaled products, and what key centering takes from each logit.
// INT8 under a bias: the maximum is relative to `origin`, the largest logit so far.
struct RowState {
  alignas(kAlignment) float origin[kBlockRows + 16];
  alignas(kAlignment) float maximum[kBlockRows + 16];
  alignas(kAlignment) float sum[kBlockRows + 16];
  alignas(kAlignment) float factor[kBlockRows + 16];
  alignas(kAlignment) float center[kBlockRows + 16];
  alignas(kAlignment) int32_t key_bias[kBlockRows + 16];
  // The query's part of what offsets add to a logit, scaled: its sum times the key's offset, and
  // its offset times the key's code sum. The value offsets' part of the sum of values.
  alignas(kAlignment) float query_sum[kBlockRows + 16];
  alignas(kAlignment) float query_offset[kBlockRows + 16];
  alignas(kAlignment) float value_offset[kBlockRows + 16];
};

// Rows of one query head whose scores are alive at once. Row r of the group is query rows.begin + r
// and row first + r of its block, whose state is kept from one block of keys to the next.
template <class Isa, class Rules>
struct RowGroup {
  const Visibility& visibility;
  const Rules& rules;
  const DropoutRow<Isa>& dropout;
  Range rows;
  int64_t first;
  RowState& state;

  int64_t count() const { return rows.end - rows.begin; }
  // The keys that row r sees.
  Range visible(int64_t r) const { return visibility.of_row(rows.begin + r); }
};

// Keys of a kv head, from key `first` on: column c of scores is key first + c, which is packed as
// key packed_first + c of a slot.
template <class Core>
struct KeyBlock {
  using Lane = typename Core::Lane;
  int64_t b, k, first;
  const PackedKeyValues<Core>& packed;
  int64_t slot, packed_first;

  KeyBlock from(int64_t column) const {
    return {b, k, first + column, packed, slot, packed_first + column};
  }
  Range keys(Range columns) const { return {first + columns.begin, first + columns.end}; }
  Range columns(Range keys) const { return {keys.begin - first, keys.end - first}; }
  const Lane* key_panels(int64_t column) const {
    return packed.key_panels(slot, packed_first + column);
  }
  const Lane* value_lines(int64_t column) const {
    return packed.value_lines(slot, packed_first + column);
  }
  // INT8, else none.
  KeyScales scales() const {
    if constexpr (Core::kArithmetic != Arithmetic::kInt8) return {};
    return packed.key_scales(slot, packed_first);
  }
  // Of each key: whether its values are packed as zeros.
  const uint8_t* has_zeros() const { return packed.has_zeros(slot) + packed_first; }
};

}  // namespace
}  // namespace jax_gluon::cpu
