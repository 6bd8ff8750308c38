// Keys and values of a forward pass before any of them is packed: what is taken from their rows,
// and the units that value scales are folded in.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/forward/forward_blocks.h"
#include "cpu/rows/centered_rows.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class KeyValueRows {
  using Isa = typename Core::Isa;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8;

 public:
  // What is dropped has no part in a center of values, which is then no constant of a row. With
  // `keeps_centers` all rows come with theirs.
  explicit KeyValueRows(const AttentionForwardCall& call, bool keeps_centers = false)
      : call_(call),
        has_offsets_(kInt8 && (has_offset(call.query) || has_offset(call.key))),
        has_value_offsets_(kInt8 && has_offset(call.value)),
        keys_(call, call.key, call.H, keeps_centers),
        values_(call, call.value, call.V, keeps_centers || call.dropout) {}

  // INT8: finds centers and units.
  void prepare(Parallel& parallel) {
    if constexpr (kInt8) {
      // Rows that are rounded again are rounded without their center.
      if (call_.key.quantization.head_block != 0) keys_.find_centers(parallel);
      if (call_.value.quantization.head_block != 0) values_.find_centers_and_largest(parallel);
      value_unit_.allocate(call_.B * call_.K);
      parallel.run(call_.B * call_.K, [this](int64_t head) { find_value_unit(head); });
    }
  }

  // What the value scales of a head are folded in units of.
  float value_unit(int64_t head) const { return kInt8 ? value_unit_[head] : 1.0f; }
  // INT8: whether keys or queries, and whether values, are stored with offsets.
  bool has_offsets() const { return has_offsets_; }
  bool has_value_offsets() const { return has_value_offsets_; }
  const CenteredRows<Isa>& keys() const { return keys_; }
  const CenteredRows<Isa>& values() const { return values_; }

 private:
  static bool has_offset(const QuantizableOperand& x) {
    return x.quantization.offset && x.quantization.head_block == 0;
  }

  // A power of two near the head's largest value scale: folded in units of it, no scale, reciprocal
  // or sum of reciprocals leaves float32's range.
  void find_value_unit(int64_t head) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Range keys = Visibility(call_, b).keys();
    float largest = 0.0f;
    if (call_.value.quantization.head_block != 0) largest = values_.largest(b, k) / 127.0f;
    for (int64_t j = keys.begin; call_.value.quantization.head_block == 0 && j < keys.end; ++j) {
      const float scale = scale_at(call_.value, b, j, k).scale;
      if (scale <= std::numeric_limits<float>::max()) largest = std::max(largest, scale);
    }
    value_unit_[head] = largest > 0.0f ? std::exp2(std::round(std::log2(largest))) : 1.0f;
  }

  const AttentionForwardCall& call_;
  const bool has_offsets_, has_value_offsets_;
  CenteredRows<Isa> keys_, values_;
  Buffer<float> value_unit_;  // of each head
};

}  // namespace
}  // namespace jax_gluon::cpu
