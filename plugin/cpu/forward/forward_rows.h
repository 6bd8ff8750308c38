// Rows of queries on their way into a forward pass, and rows of its results on their way out.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/key_value_rows.h"
#include "cpu/forward/row_group.h"
#include "cpu/rows/sink.h"
#include "cpu/tiles/pack.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class ForwardRows {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  static constexpr int R = Core::kTileRows, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;

 public:
  ForwardRows(const AttentionForwardCall& call, const KeyValueRows<Core>& key_values)
      : call_(call),
        key_values_(key_values),
        head_lanes_(row_lanes<Core>(call.H)),
        value_columns_(round_up(call.V, Core::kTileColumns)) {}

  // At most kBlockRows rows of query head n as row tiles, zeros up to a whole group, and their
  // state before any key.
  void load(int64_t b, int64_t n, Range rows, RowScratch<Core>& s, Lane* tiles,
            RowState& state) const {
    const float scale = call_.scale * kLog2E;
    for (int r = 0; r < kBlockRows; ++r) {
      state.origin[r] = call_.bias ? kHidden : 0.0f;
      state.maximum[r] = kHidden;
      state.sum[r] = 0.0f;
      state.factor[r] = scale;
      state.center[r] = 0.0f;
      state.key_bias[r] = 0;
      state.query_sum[r] = 0.0f;
      state.query_offset[r] = 0.0f;
      state.value_offset[r] = 0.0f;
    }
    const int64_t count = rows.end - rows.begin;
    touch_rows(call_.query, b, rows.begin, rows.end, n, call_.H);
    for (int64_t t = 0; t < round_up(count, kGroupRows); t += R) {
      for (int r = 0; r < R; ++r) {
        Lane* out = s.rows.get() + r * head_lanes_;
        if (t + r >= count) {
          std::fill(out, out + head_lanes_, Lane(0));
          continue;
        }
        const int64_t i = rows.begin + t + r;
        load_query(b, i, n, t + r, s, out, state);
      }
      interleave<Isa, R>(s.rows.get(), head_lanes_, head_lanes_, tiles + t * head_lanes_);
    }
  }

  // Adds probability(r, c) * value for each of the keys of `columns` that are packed as zeros to
  // `out`, `rows` of value_columns.
  template <class Probability>
  void add_unpacked_values(const KeyBlock<Core>& keys, Range columns, int64_t rows,
                           RowScratch<Core>& s, float* out, Probability probability) const {
    const uint8_t* has_zeros = keys.has_zeros();
    bool any = false;
    for (int64_t c = columns.begin; c < columns.end; ++c) any |= has_zeros[c] != 0;
    if (!any) return;
    const float per_unit = 1.0f / key_values_.value_unit(keys.b * call_.K + keys.k);
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      if (!has_zeros[c]) continue;
      key_values_.values().load(keys.b, keys.first + c, keys.k, s.row.get());
      for (int64_t r = 0; r < rows; ++r) {
        const float p = probability(r, c);
        if (p == 0.0f) continue;
        float* o = out + r * value_columns_;
        for (int64_t v = 0; v < call_.V; ++v) o[v] += p * (s.row[v] * per_unit);
      }
    }
  }

  // Writes row i of query head n, row r of its block: `out` takes what values share, divided. The
  // divisor of a row that sees no key is 0.
  RowTotal store(int64_t b, int64_t n, int64_t i, int64_t r, float* out,
                 const RowState& state) const {
    const float sum = state.sum[r];
    const bool empty = sum == 0.0f;
    const int64_t k = n / (call_.N / call_.K);
    const float unit = key_values_.value_unit(b * call_.K + k);
    RowTotal total = {sum, 1.0f, 0.0f, kEmptyRowLog2Sum};
    if (!empty) total = total_of_row(sum, r, sink_of(call_, b, n), state);
    float factor = empty ? 0.0f : unit * call_.dropout.scale / total.divisor;
    const float* center = key_values_.values().center_of(b, k);
    if (!empty && (center || key_values_.has_value_offsets())) {
      const float offset =
          key_values_.has_value_offsets() ? state.value_offset[r] / total.divisor : 0.0f;
      for (int64_t c = 0; c < call_.V; ++c) {
        out[c] = out[c] * factor + offset + (center ? center[c] * total.share : 0.0f);
      }
      factor = 1.0f;
    }
    store_row<Isa>(call_.out, call_.out.at(b, i, n), out, call_.V, factor);
    const int64_t index = call_.row_maximum.at(b, i, n);
    static_cast<float*>(call_.row_maximum.data)[index] = total.maximum;
    static_cast<float*>(call_.log2_sum.data)[index] = total.log2_sum;
    return total;
  }

 private:
  RowTotal total_of_row(float sum, int64_t r, float sink, const RowState& state) const {
    float maximum = state.maximum[r] == kHidden ? 0.0f : state.maximum[r];
    if (!kBf16 && !needs_whole_logits(call_)) maximum += state.center[r];
    if (!kInt8 || !call_.bias) return total_of(sum, maximum, sink);
    const float origin = state.origin[r] == kHidden ? 0.0f : state.origin[r];
    RowTotal total = total_of(sum, maximum, sink - origin);
    if (total.maximum > maximum) {
      total.maximum = sink;
    } else {
      total.log2_sum += maximum;
      total.maximum = origin;
    }
    return total;
  }

  void load_query(int64_t b, int64_t i, int64_t n, int64_t row, RowScratch<Core>& s, Lane* out,
                  RowState& state) const {
    const float scale = call_.scale * kLog2E;
    const float* center = key_values_.keys().center_of(b, n / (call_.N / call_.K));
    if constexpr (kInt8) {
      const auto [codes, own] =
          QuantizedRow<Isa>::codes_of(call_.query, b, i, n, call_.H, s.row.get(), s.codes.get());
      row_to_lanes<Core>(codes, DType::kS8, call_.H, 0, out);
      const int32_t total = sum_of(codes, call_.H);
      state.factor[row] = own.scale * scale;
      state.key_bias[row] = Core::kKeyBias * total;
      if (key_values_.has_offsets()) {
        const float sum = own.scale * static_cast<float>(total);
        state.query_sum[row] = scale * (sum + static_cast<float>(call_.H) * own.offset);
        state.query_offset[row] = scale * own.offset;
      }
      if (center) {
        // The row itself, not the codes that it was rounded to once more.
        QuantizedRow<Isa>::load(call_.query, b, i, n, call_.H, s.row.get());
        state.center[row] = scale * dot<Isa>(s.row.get(), center, call_.H);
      }
    } else if constexpr (kBf16) {
      row_to_lanes<Core>(row_of(call_.query, b, i, n), call_.query.dtype, call_.H, 0, out);
    } else {
      QuantizedRow<Isa>::load_uncentered(call_.query, b, i, n, call_.H, out);
      scale_row<Isa>(out, call_.H, scale);
      if (center) state.center[row] = dot<Isa>(out, center, call_.H);
    }
  }

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& key_values_;
  const int64_t head_lanes_, value_columns_;
};

}  // namespace
}  // namespace jax_gluon::cpu
