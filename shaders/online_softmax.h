// Eight query rows and their softmax so far: what a simdgroup of the forward kernels keeps in
// registers.
#pragma once

#include "key_value_tiles.h"

template <typename M, int D>
struct OnlineSoftmax {
  // Whose inverse is finite; smaller values lose digits.
  static constant constexpr float kLeastUnit = 1e-30f;
  static constant constexpr int kTileRows = BlockSizes<M, D>::kTileRows;
  static constant constexpr int kStride = BlockSizes<M, D>::kStride;

  Matrix<M> query[D / 8];
  // Sums of probabilities times values, in multiples of `unit`.
  Matrix<float> out[D / 8];
  float factor;   // of products, without the scale of the key
  float centre;   // what centring took from the logits of the lane's row
  float maximum;  // of the row's logits
  float sum;      // of the lane's probabilities relative to it
  // Of exact codes: the row's largest product of a probability and a value's scale so far, so that
  // those products can be rounded to half.
  float unit;

  // Row `token` of `rows`, the lane's; rows at `end` and past it are zeros.
  void start(thread const Operands& operands, thread const Rows& rows, thread const Rows& keys,
             int token, int end, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    const Place place(lane);
    const bool is_inside = token < end;
    const bool is_exact = has_exact_codes<M>(rows.type);
    float dot = 0.0f;
    const bool is_centred = keys.has_mean();
    for (int d = 0; d < D / 8; ++d) {
      float x[2] = {0.0f, 0.0f};
      for (int i = 0; is_inside && i < 2; ++i) {
        const int h = 8 * d + place.column + i;
        if (h >= p.H) continue;
        if (is_exact) {
          x[i] = load_element(rows.data, rows.type, token * rows.stride, h) +
                 rows.code_offset_at(token, 0);
        } else {
          x[i] = rows.value(token, h);
        }
        if (is_centred) dot += x[i] * keys.mean_at(h);
      }
      query[d] = matrix_of<M>(x[0], x[1]);
      out[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    factor = p.scale * kLog2E;
    if (is_exact && is_inside) factor *= rows.scale_at(token, 0);
    centre = is_centred ? row_sum(dot) * factor : 0.0f;
    maximum = -INFINITY;
    sum = 0.0f;
    unit = has_exact_codes<M>(value_type) ? kLeastUnit : 1.0f;
  }

  // Takes in the keys of a tile, which stand for keys key0 and the following; only those matrices
  // that have one of `seen`, the keys that any of the eight rows sees. `is_dirty`: the tile of
  // values has zeros for what is not finite.
  void attend(thread const AttentionParameters& p, thread const RowRules& rules, Range seen,
              int key0, thread const KeyValueTiles<M, D>& tiles, thread const Rows& keys,
              thread const Rows& values, bool is_dirty, ushort lane) thread {
    const Place place(lane);
    const bool key_is_exact = has_exact_codes<M>(keys.type);
    const bool value_is_exact = has_exact_codes<M>(values.type);
    const bool adds_centre = centre != 0.0f && needs_whole_logits(p);
    float2 logits[kTileRows / 8];
    uint used = 0;
    float largest = maximum;
    for (int t = 0; t < kTileRows / 8; ++t) {
      const int first = key0 + 8 * t;
      if (first >= seen.end || first + 8 <= seen.begin) continue;
      const int own = first + place.column;
      const bool2 is_seen = bool2(rules.sees(p, own), rules.sees(p, own + 1));
      if (has_mask && !simd_any(is_seen.x || is_seen.y)) continue;
      used |= 1u << t;
      Matrix<float> product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.H) continue;
        Matrix<M> right;
        simdgroup_load(right, tiles.keys + 8 * t * kStride + 8 * d, kStride, ulong2(0), true);
        simdgroup_multiply_accumulate(product, query[d], right, product);
      }
      for (int i = 0; i < 2; ++i) {
        float x = -INFINITY;
        if (is_seen[i]) {
          x = product.thread_elements()[i] * factor;
          if (key_is_exact) x *= tiles.key_scales[8 * t + place.column + i];
          if (adds_centre) x += centre;
          float slope;
          x = rules.logit(p, x, own + i, slope);
        }
        logits[t][i] = x;
        largest = max(largest, x);
      }
    }
    if (used == 0) return;
    largest = row_max(largest);
    // A row that has seen no key keeps a finite number to subtract.
    const float subtracted = largest == -INFINITY ? 0.0f : largest;
    float rescale = exp2(maximum - subtracted);
    maximum = largest;
    sum *= rescale;
    // From here on, `logits` holds what values are weighted with.
    float largest_weight = 0.0f;
    for (int t = 0; t < kTileRows / 8; ++t) {
      if ((used >> t & 1) == 0) continue;
      for (int i = 0; i < 2; ++i) {
        float weight = exp2(logits[t][i] - subtracted);
        sum += weight;
        // What a hidden key's scale is does not matter, NaN neither.
        if (value_is_exact && weight != 0.0f) {
          weight *= tiles.value_scales[8 * t + place.column + i];
          largest_weight = max(largest_weight, weight);
        }
        logits[t][i] = weight;
      }
    }
    float inverse_unit = 1.0f;
    if (value_is_exact) {
      const float before = unit * rescale;
      unit = max(max(before, row_max(largest_weight)), kLeastUnit);
      inverse_unit = 1.0f / unit;
      rescale = before * inverse_unit;
    }
    for (int d = 0; d < D / 8; ++d) {
      if (8 * d >= p.V) continue;
      out[d].thread_elements()[0] *= rescale;
      out[d].thread_elements()[1] *= rescale;
    }
    for (int t = 0; t < kTileRows / 8; ++t) {
      if ((used >> t & 1) == 0) continue;
      const float weights[2] = {logits[t][0] * inverse_unit, logits[t][1] * inverse_unit};
      const Matrix<M> left = matrix_of<M>(weights[0], weights[1]);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.V) continue;
        Matrix<M> right;
        simdgroup_load(right, tiles.values + 8 * t * kStride + 8 * d, kStride, ulong2(0), false);
        simdgroup_multiply_accumulate(out[d], left, right, out[d]);
      }
      if (is_dirty) {
        add_nonfinite<D>(values, key0 + 8 * t, p.S, weights, out, lane);
      }
    }
  }

  // The lane's two elements of column block d of the result, without the values' mean.
  float2 result(thread const Rows& values, int d, float row_total, ushort lane) thread {
    float2 x = 0.0f;
    if (row_total > 0.0f || isnan(row_total)) {
      for (int i = 0; i < 2; ++i) x[i] = out[d].thread_elements()[i] / row_total;
    }
    if (has_exact_codes<M>(values.type)) {
      x *= unit;
      if (values.quantization.head_block != 0) {
        const Place place(lane);
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * d + place.column + i;
          if (column < values.columns) x[i] *= values.scale_at(0, values.column_block(column));
        }
      }
    }
    return x;
  }
};
