// Eight query rows and their softmax so far: what a simdgroup of the forward kernels keeps in
// registers.
//
// Probabilities are relative to the row's largest logit so far, rounded up to a whole number, and
// are made as 2^fraction * 2^whole: a new maximum scales what there is by a power of two, exactly.
// So a result does not depend on how many keys are taken in at once, but for probabilities that
// are too small for the elements of the matrices.
#pragma once

#include "key_value_tiles.h"
#include "sink.h"

// 2^n of a whole n in [-126, 0].
inline float power_of_two(float n) { return as_type<float>((int(n) + 127) << 23); }
// The smallest power of two that is not below a positive x.
inline float up_to_power_of_two(float x) {
  return as_type<float>((as_type<uint>(x) + 0x7fffffu) & 0x7f800000u);
}
// 2^(x - whole_maximum), where x is not above the whole number, or NaN, or +inf.
inline float probability(float x, float whole_maximum) {
  const float whole = clamp(floor(x), whole_maximum - 126.0f, whole_maximum);
  return exp2(x - whole) * power_of_two(max(whole - whole_maximum, -126.0f));
}

// Logits of eight rows at as many keys; the lane's.
template <int kKeys>
struct Scores {
  float2 logits[kKeys / 8];
  uint used;  // a bit for each matrix that has them
};

template <typename M, int D>
struct OnlineSoftmax {
  static constant constexpr float kMinUnit = 0x1p-100f;
  static constant constexpr int kTileRows = BlockSizes<M, D>::kTileRows;
  static constant constexpr int kStride = BlockSizes<M, D>::kStride;

  Matrix<M> query[D / 8];
  // Sums of probabilities times values, in multiples of `unit`.
  Matrix<float> out[D / 8];
  float factor;   // of products, without the scale of the key
  float center;   // what centering took from the logits of the lane's row
  float maximum;  // of the row's logits, rounded up to a whole number
  float sum;      // of the lane's probabilities relative to it
  // Of exact codes: a power of two not below the row's largest product of a probability and a
  // value's scale so far, so that those products can be rounded to half.
  float unit;

  // Row `token` of `rows`, the lane's; rows at `end` and past it are zeros.
  void start(thread const Operands& operands, thread const Rows& rows, thread const Rows& keys,
             int token, int end, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    const Place place(lane);
    const bool is_inside = token < end;
    const bool is_exact = has_exact_codes<M>(rows.type);
    float dot = 0.0f;
    const bool is_centered = keys.has_center();
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
        if (is_centered) dot += x[i] * keys.center_at(h);
      }
      query[d] = matrix_of<M>(x[0], x[1]);
      out[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    factor = p.scale * kLog2E;
    if (is_exact && is_inside) factor *= rows.scale_at(token, 0);
    center = is_centered ? row_sum(dot) * factor : 0.0f;
    maximum = -INFINITY;
    sum = 0.0f;
    unit = has_exact_codes<M>(value_type) ? kMinUnit : 1.0f;
  }

  // Logits of kKeys keys, which stand for keys key0 and the following and have their rows at
  // `tile`, their scales at `scales`; only of those matrices that have one of `seen`, the keys that
  // any of the eight rows sees.
  template <int kKeys>
  Scores<kKeys> score(thread const AttentionParameters& p, thread const RowRules& rules, Range seen,
                      int key0, threadgroup const M* tile, threadgroup const float* scales,
                      thread const Rows& keys, ushort lane) thread {
    const Place place(lane);
    const bool is_exact = has_exact_codes<M>(keys.type);
    const bool adds_centre = center != 0.0f && needs_whole_logits(p);
    Scores<kKeys> scores;
    scores.used = 0;
    for (int t = 0; t < kKeys / 8; ++t) {
      const int first = key0 + 8 * t;
      if (first >= seen.end || first + 8 <= seen.begin) continue;
      const int own = first + place.column;
      const bool2 is_seen = bool2(rules.sees(p, own), rules.sees(p, own + 1));
      if (p.has_mask != 0 && !simd_any(is_seen.x || is_seen.y)) continue;
      scores.used |= 1u << t;
      Matrix<float> product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.H) continue;
        const Matrix<M> right = matrix_at<true>(tile + 8 * t * kStride + 8 * d, kStride, place);
        simdgroup_multiply_accumulate(product, query[d], right, product);
      }
      for (int i = 0; i < 2; ++i) {
        float x = -INFINITY;
        if (is_seen[i]) {
          x = product.thread_elements()[i] * factor;
          if (is_exact) x *= scales[8 * t + place.column + i];
          if (adds_centre) x += center;
          float slope;
          x = rules.logit(p, x, own + i, slope);
        }
        scores.logits[t][i] = x;
      }
    }
    return scores;
  }

  // Takes in keys key0 and the following, whose values have their rows at `tile`, their scales at
  // `scales`. `is_dirty`: the tile has zeros for what is not finite.
  template <int kKeys>
  void accumulate(thread const AttentionParameters& p, thread const RowRules& rules,
                  Scores<kKeys> scores, int key0, threadgroup const M* tile,
                  threadgroup const float* scales, thread const Rows& values, bool is_dirty,
                  ushort lane) thread {
    if (scores.used == 0) return;
    const Place place(lane);
    const bool is_exact = has_exact_codes<M>(values.type);
    float largest = maximum;
    for (int t = 0; t < kKeys / 8; ++t) {
      if ((scores.used >> t & 1) == 0) continue;
      largest = max(max(largest, scores.logits[t].x), scores.logits[t].y);
    }
    largest = ceil(row_max(largest));
    float rescale =
        largest == maximum ? 1.0f : power_of_two(clamp(maximum - largest, -126.0f, 0.0f));
    maximum = largest;
    // A row that has seen no key, or one at infinity, keeps a finite number to subtract.
    const float subtracted = isinf(largest) ? 0.0f : largest;
    sum *= rescale;
    // From here on, logits are what values are weighted with.
    float largest_weight = 0.0f;
    for (int t = 0; t < kKeys / 8; ++t) {
      if ((scores.used >> t & 1) == 0) continue;
      for (int i = 0; i < 2; ++i) {
        float weight = probability(scores.logits[t][i], subtracted);
        sum += weight;
        if (!rules.dropout.keeps(key0 + 8 * t + place.column + i)) weight = 0.0f;
        // What a hidden key's scale is does not matter, NaN neither.
        if (is_exact && weight != 0.0f) {
          weight *= scales[8 * t + place.column + i];
          largest_weight = max(largest_weight, weight);
        }
        scores.logits[t][i] = weight;
      }
    }
    float inverse_unit = 1.0f;
    if (is_exact) {
      const float before = unit * rescale;
      unit = max(max(before, up_to_power_of_two(row_max(largest_weight))), kMinUnit);
      inverse_unit = 1.0f / unit;
      rescale = before * inverse_unit;
    }
    if (simd_any(rescale != 1.0f)) {
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.V) continue;
        out[d].thread_elements()[0] *= rescale;
        out[d].thread_elements()[1] *= rescale;
      }
    }
    for (int t = 0; t < kKeys / 8; ++t) {
      if ((scores.used >> t & 1) == 0) continue;
      const float weights[2] = {scores.logits[t][0] * inverse_unit,
                                scores.logits[t][1] * inverse_unit};
      const Matrix<M> left = matrix_of<M>(weights[0], weights[1]);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.V) continue;
        const Matrix<M> right = matrix_at<false>(tile + 8 * t * kStride + 8 * d, kStride, place);
        simdgroup_multiply_accumulate(out[d], left, right, out[d]);
      }
      if (is_dirty) add_nonfinite<D>(values, key0 + 8 * t, p.S, weights, out, lane);
    }
  }

  // Takes in the keys of a tile.
  void attend(thread const AttentionParameters& p, thread const RowRules& rules, Range seen,
              int key0, thread const KeyValueTiles<M, D>& tiles, thread const Rows& keys,
              thread const Rows& values, bool is_dirty, ushort lane) thread {
    const Scores<kTileRows> scores =
        score<kTileRows>(p, rules, seen, key0, tiles.keys, tiles.key_scales, keys, lane);
    accumulate(p, rules, scores, key0, tiles.values, tiles.value_scales, values, is_dirty, lane);
  }

  // Of the row's probabilities; NaN where a logit is +inf.
  float total() const thread {
    const float total = row_sum(sum);
    return maximum == INFINITY ? NAN : total;
  }

  // The lane's two elements of column block d of the result, without the values' center.
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
