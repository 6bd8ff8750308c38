// What the kernels of backward recompute: P and dS of matrices of scores, from the statistics of
// their rows. Keys and values come without their centers: what a center adds to the logits of a row
// is one number, kept beside the row's maximum, and what it adds to dP and to delta cancels.
#pragma once

#include "key_value_tiles.h"
#include "sink.h"

// clang-format off
#define JAX_GLUON_COTANGENTS                                                                       \
  device const uchar* out [[buffer(kOut)]],                                                        \
  device const float* row_maximum [[buffer(kRowMaximum)]],                                         \
  device const float* log2_sum [[buffer(kLog2Sum)]],                                               \
  device const uchar* out_gradient [[buffer(kOutGradient)]],                                       \
  device const float* log_sum_exp_gradient [[buffer(kLogSumExpGradient)]]

#define JAX_GLUON_MAKE_COTANGENTS                                                                  \
  Cotangents{out, row_maximum, log2_sum, out_gradient, log_sum_exp_gradient}
// clang-format on

// Outputs of forward and their gradients, each dense but for its batch offsets.
struct Cotangents {
  device const uchar* out;
  device const float* row_maximum;
  device const float* log2_sum;
  device const uchar* out_gradient;
  device const float* log_sum_exp_gradient;
};

// The rows of one head of dO.
inline Rows out_gradient_rows(thread const Operands& operands, thread const Cotangents& cotangents,
                              int b, int n) {
  thread const AttentionParameters& p = *operands.parameters;
  Rows rows;
  const Int64 first =
      operands.batch_offset(kOutGradientBatch, b) + row_index(p, 0, 0, p.T, n, p.N) * p.V;
  rows.type = p.out_gradient_type;
  rows.data = cotangents.out_gradient + first * (rows.type == kF32 ? 4 : 2);
  rows.scale = operands.query_scale;
  rows.offset = operands.query_offset;
  rows.center = operands.query_center;
  rows.quantization = p.query_quantization;
  rows.adds_center = false;
  rows.columns = p.V;
  rows.stride = p.is_head_major != 0 ? p.V : Int64(p.N) * p.V;
  return rows;
}

// Whether forward's output, or the probabilities that it was made of, had fewer bits than P has
// here: rows of dS do not sum to 0 with delta from it, until sums of P * dP have refined it.
inline bool refines_delta() { return query_type != kF32 || key_type != kF32 || value_type != kF32; }

// P and dS of one element.
struct ScoreGradient {
  float probability;
  float centered;  // P * (dP - delta)
  float slope;     // of the soft cap
  float share;     // of P that dropout leaves, over what it leaves of all

  float gradient() const thread { return centered * slope; }
};

// `product` is q k^T, `probability_gradient` dO v^T; 0 where the row does not see the key.
inline ScoreGradient score_gradient(thread const AttentionParameters& p,
                                    thread const RowRules& rules, RowStatistics row, int key,
                                    bool is_seen, float product, float probability_gradient) {
  if (!is_seen) return {0.0f, 0.0f, 0.0f, 0.0f};
  float x = product * (p.scale * kLog2E) + row.center;
  float slope;
  x = rules.logit(p, x, key, slope);
  // In this order: log2_sum would vanish in a large maximum.
  const float probability = exp2((x - row.maximum) - row.log2_sum);
  const float share = rules.dropout.keeps(key) ? p.dropout_scale : 0.0f;
  if (p.dropout_threshold != 0) {
    probability_gradient = share == 0.0f ? 0.0f : probability_gradient * share;
  }
  // Where P is 0, dP may be NaN.
  const float centered =
      probability == 0.0f ? 0.0f : probability * (probability_gradient - row.delta);
  return {probability, centered, slope, share};
}

// What a row's delta lacks: a lane's sums over the keys.
struct DeltaRemainder {
  float probability;
  float centered;

  void add(ScoreGradient score) thread {
    probability += score.probability;
    centered += score.centered;
  }
  // Of the lane's row. The log-sum-exp has not the last bits of logits that are large: P is divided
  // by its sum.
  float of_row(float log_sum_exp_gradient) const thread {
    const float sum = row_sum(probability), product = row_sum(centered);
    return sum == 0.0f ? 0.0f : product / sum - log_sum_exp_gradient;
  }
};

// What a lane has of a matrix of scores before their gradients: q k^T and dO v^T.
struct ScoreProducts {
  bool is_used;  // else no row of the matrix sees any of its keys
  bool2 is_seen;
  float2 product;
  float2 probability_gradient;
};

// The products of eight rows in registers, which meet H columns and V columns, with eight rows of a
// tile for each.
template <typename M, int D>
inline void multiply_scores(thread const AttentionParameters& p, thread const Matrix<M>* left,
                            threadgroup const M* right_rows, thread const Matrix<M>* left_gradient,
                            threadgroup const M* right_gradient_rows, Place place,
                            thread ScoreProducts& made) {
  constexpr int kStride = BlockSizes<M, D>::kStride;
  Matrix<float> product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  Matrix<float> gradient = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int d = 0; d < D / 8; ++d) {
    Matrix<M> right;
    if (8 * d < p.H) {
      right = matrix_at<true>(right_rows + 8 * d, kStride, place);
      simdgroup_multiply_accumulate(product, left[d], right, product);
    }
    if (8 * d < p.V) {
      right = matrix_at<true>(right_gradient_rows + 8 * d, kStride, place);
      simdgroup_multiply_accumulate(gradient, left_gradient[d], right, gradient);
    }
  }
  for (int i = 0; i < 2; ++i) {
    made.product[i] = product.thread_elements()[i];
    made.probability_gradient[i] = gradient.thread_elements()[i];
  }
}

// Eight query rows in the registers of a simdgroup.
template <typename M, int D>
struct BackwardRows {
  Matrix<M> query[D / 8];
  Matrix<M> out_gradient[D / 8];
  RowStatistics statistics;    // of the lane's row
  float log_sum_exp_gradient;  // likewise
  DeltaRemainder remainder;    // what the sink, a key whose value is 0, adds to it

  void start(thread const Operands& operands, thread const Cotangents& cotangents, int b, int n,
             int token, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    const Place place(lane);
    const bool is_inside = token < p.T;
    const int k = n / (p.N / p.K);
    const Rows rows = operands.query_rows(b, n), keys = operands.key_rows(b, k);
    const Rows values = operands.value_rows(b, k);
    const Rows gradients = out_gradient_rows(operands, cotangents, b, n);
    const int out_size = p.out_type == kF32 ? 4 : 2;
    device const uchar* out_rows =
        cotangents.out +
        (operands.batch_offset(kOutBatch, b) + row_index(p, 0, 0, p.T, n, p.N) * p.V) * out_size;
    float center = 0.0f, delta = 0.0f, value_center = 0.0f;
    for (int d = 0; d < D / 8; ++d) {
      float q[2] = {0.0f, 0.0f}, g[2] = {0.0f, 0.0f};
      for (int i = 0; is_inside && i < 2; ++i) {
        const int column = 8 * d + place.column + i;
        if (column < p.H) {
          q[i] = rows.value(token, column);
          if (keys.has_center()) center += q[i] * keys.center_at(column);
        }
        if (column < p.V) {
          g[i] = gradients.value(token, column);
          const float x = load_float(out_rows, p.out_type, token * gradients.stride + column);
          if (values.adds_center) {
            delta += g[i] * x;
          } else {
            delta += g[i] * (x - values.center_at(column));
            if (p.has_sinks != 0) value_center += g[i] * values.center_at(column);
          }
        }
      }
      query[d] = matrix_of<M>(q[0], q[1]);
      out_gradient[d] = matrix_of<M>(g[0], g[1]);
    }
    center = row_sum(center) * (p.scale * kLog2E);
    delta = row_sum(delta);
    statistics = {0.0f, JAX_GLUON_EMPTY_ROW_LOG2_SUM, 0.0f, 0.0f};
    log_sum_exp_gradient = 0.0f;
    remainder = {0.0f, 0.0f};
    if (p.has_sinks != 0) value_center = row_sum(value_center);
    if (!is_inside) return;
    const Int64 at = row_index(p, 0, token, p.T, n, p.N);
    statistics.maximum = cotangents.row_maximum[operands.batch_offset(kRowMaximumBatch, b) + at];
    statistics.log2_sum = cotangents.log2_sum[operands.batch_offset(kLog2SumBatch, b) + at];
    if (p.has_log_sum_exp_gradient != 0) {
      log_sum_exp_gradient =
          cotangents.log_sum_exp_gradient[operands.batch_offset(kLogSumExpGradientBatch, b) + at];
    }
    statistics.delta = delta - log_sum_exp_gradient;
    if (p.has_sinks != 0 && place.column == 0 &&
        statistics.log2_sum != JAX_GLUON_EMPTY_ROW_LOG2_SUM) {
      const float sink = sink_of(operands, b, n);
      const float probability = exp2((sink - statistics.maximum) - statistics.log2_sum);
      // Its dP is 0 less the part of the values' center.
      remainder = {probability, probability * (-value_center - statistics.delta)};
    }
    if (needs_whole_logits(p)) {
      statistics.center = center;
    } else {
      statistics.maximum -= center;
    }
  }

  // Of keys `first` and the following, whose rows of keys and of values are given, unless none of
  // the eight rows sees any of them. `seen`: the keys that any of the rows sees; `rules` are those
  // of the lane's row.
  ScoreProducts multiply(thread const AttentionParameters& p, thread const RowRules& rules,
                         Range seen, int first, threadgroup const M* keys,
                         threadgroup const M* values, ushort lane) thread {
    ScoreProducts made;
    made.is_used = false;
    if (first >= seen.end || first + 8 <= seen.begin) return made;
    const int own = first + Place(lane).column;
    made.is_seen = bool2(rules.sees(p, own), rules.sees(p, own + 1));
    if (p.has_mask != 0 && !simd_any(made.is_seen.x || made.is_seen.y)) return made;
    made.is_used = true;
    multiply_scores<M, D>(p, query, keys, out_gradient, values, Place(lane), made);
    return made;
  }
};
