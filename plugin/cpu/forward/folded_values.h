// INT8: the value rows of a subtile of keys, and how their scales are folded into probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/forward/key_value_rows.h"

namespace jax_gluon::cpu {
namespace {

// A value row's scale is folded into its probability before that is rounded to 8 bits. Scales of
// zero, or so small beside their subtile's largest that the row can't show, fold as a small number
// instead: their codes are 0 or vanish, and the reciprocal, which takes the factor out of the
// normaliser again, stays finite.
struct FoldedValues {
  const int8_t* rows[kSubtileKeys];  // null: packed as zeros
  // log2 of what is folded, in units of the head's value unit, and its reciprocal.
  float fold_log2[kSubtileKeys], fold_inverse[kSubtileKeys];
  float offset[kSubtileKeys];
  uint8_t has_zeros[kSubtileKeys];  // whether the row is not finite
};

// Of the keys from j0 on, up to `end`. Rows point into `s` or the call.
template <class Core>
void load_folded_values(const KeyValueRows<Core>& rows, const AttentionForwardCall& call,
                        int64_t head, int64_t j0, int64_t end, RowScratch<Core>& s,
                        FoldedValues& out) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const int64_t b = head / call.K, k = head % call.K;
  const float unit = 1.0f / rows.value_unit(head);
  float scale[kSubtileKeys] = {}, largest = 0.0f;
  for (int64_t c = 0; c < kSubtileKeys; ++c) {
    out.rows[c] = nullptr;
    out.offset[c] = 0.0f;
    out.has_zeros[c] = 0;
    if (j0 + c >= end) continue;
    const ScaledCodes row =
        rows.values().codes_of(b, j0 + c, k, s.row.get(), s.codes.get() + c * s.code_stride);
    const ScaleAndOffset own = row.scale;
    const bool is_finite = own.scale >= 0.0f && own.scale <= kMax;
    out.has_zeros[c] = !is_finite || !(std::fabs(own.offset) <= kMax);
    // A row without a scale is its offset alone.
    if (!out.has_zeros[c] && own.scale != 0.0f) out.rows[c] = row.codes;
    if (!out.has_zeros[c]) out.offset[c] = own.offset;
    scale[c] = is_finite ? own.scale * unit : 0.0f;
    largest = std::max(largest, scale[c]);
  }
  const float smallest = largest > 0.0f ? std::max(std::ldexp(largest, -60), 0x1p-90f) : 1.0f;
  for (int64_t c = 0; c < kSubtileKeys; ++c) {
    const float x = std::max(scale[c], smallest);
    out.fold_log2[c] = std::log2(x);
    out.fold_inverse[c] = 1.0f / x;
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
