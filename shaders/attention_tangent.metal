// Attention and its derivative along tangents of the operands, in one pass over the keys: as
// attention_forward.metal, with what plugin/cpu/tangent/attention_tangent.h says of the sums. Tiles
// of keys and of their tangents make place for those of values and of theirs.
#include <metal_stdlib>

using namespace metal;

#include "instantiate.h"
#include "online_softmax.h"

// The rows of one head of a tangent; without one, rows of no columns.
inline Rows tangent_rows(thread const Operands& operands, device const uchar* data, int type,
                         RowStrides strides, int columns, Int64 batch_offset, int head) {
  const bool is_zero = type == JAX_GLUON_NO_TANGENT;
  Rows rows;
  rows.type = is_zero ? int(kF32) : type;
  rows.data = data + (batch_offset + head * strides.head) * (rows.type == kF32 ? 4 : 2);
  rows.scale = operands.query_scale;
  rows.offset = operands.query_offset;
  rows.center = operands.query_center;
  rows.quantization = operands.parameters->query_quantization;
  rows.adds_center = false;
  rows.columns = is_zero ? 0 : columns;
  rows.stride = strides.token;
  return rows;
}

// Logits of eight rows at as many keys, and their tangents; the lane's.
template <int kKeys>
struct TangentScores {
  float2 logits[kKeys / 8];
  float2 tangents[kKeys / 8];
  uint used;  // a bit for each matrix that has them
};

// Eight query rows in the registers of a simdgroup.
template <int D>
struct TangentRows {
  static constant constexpr int kStride = BlockSizes<float, D>::kStride;

  Matrix<float> query[D / 8];
  Matrix<float> query_tangent[D / 8];
  Matrix<float> out[D / 8];          // sums of p v
  Matrix<float> out_tangent[D / 8];  // sums of p (dx v + dv)
  float maximum;                     // of the row's logits, rounded up to a whole number
  float sum;                         // of the lane's probabilities relative to it
  float tangent_sum;                 // of p dx
  device const uchar* bias_tangent;  // of the lane's row
  bool has_query;
  bool has_key;
  bool has_value;
  bool has_bias;

  bool moves_logits() const thread { return has_query || has_key || has_bias; }

  // Row `token` of `rows`, the lane's; rows at `end` and past it are zeros.
  void start(thread const Rows& rows, thread const Rows& tangents, int token, int end,
             ushort lane) thread {
    const Place place(lane);
    const bool is_inside = token < end;
    for (int d = 0; d < D / 8; ++d) {
      const int h = 8 * d + place.column;
      float x[2] = {0.0f, 0.0f}, dx[2] = {0.0f, 0.0f};
      for (int i = 0; is_inside && i < 2; ++i) {
        x[i] = rows.value(token, h + i);
        dx[i] = tangents.value(token, h + i);
      }
      query[d] = matrix_of<float>(x[0], x[1]);
      query_tangent[d] = matrix_of<float>(dx[0], dx[1]);
      out[d] = out_tangent[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    maximum = -INFINITY;
    sum = tangent_sum = 0.0f;
  }

  // As OnlineSoftmax::score.
  template <int kKeys>
  TangentScores<kKeys> score(thread const AttentionParameters& p, thread const RowRules& rules,
                             Range seen, int key0, threadgroup const float* keys,
                             threadgroup const float* key_tangents, ushort lane) thread {
    const Place place(lane);
    TangentScores<kKeys> scores;
    scores.used = 0;
    for (int t = 0; t < kKeys / 8; ++t) {
      const int first = key0 + 8 * t;
      if (first >= seen.end || first + 8 <= seen.begin) continue;
      const int own = first + place.column;
      const bool2 is_seen = bool2(rules.sees(p, own), rules.sees(p, own + 1));
      if (p.has_mask != 0 && !simd_any(is_seen.x || is_seen.y)) continue;
      scores.used |= 1u << t;
      Matrix<float> product = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      Matrix<float> tangent = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.H) continue;
        const int at = 8 * t * kStride + 8 * d;
        Matrix<float> right;
        simdgroup_load(right, keys + at, kStride, ulong2(0), true);
        simdgroup_multiply_accumulate(product, query[d], right, product);
        if (has_query) simdgroup_multiply_accumulate(tangent, query_tangent[d], right, tangent);
        if (!has_key) continue;
        simdgroup_load(right, key_tangents + at, kStride, ulong2(0), true);
        simdgroup_multiply_accumulate(tangent, query[d], right, tangent);
      }
      for (int i = 0; i < 2; ++i) {
        float x = -INFINITY, dx = 0.0f;
        if (is_seen[i]) {
          float slope;
          x = rules.logit(p, product.thread_elements()[i] * (p.scale * kLog2E), own + i, slope);
          dx = tangent.thread_elements()[i] * p.scale;
          if (has_bias) {
            dx += load_float(bias_tangent, p.bias_tangent_type, (own + i) * p.bias_tangent.key);
          }
          dx *= slope;
        }
        scores.logits[t][i] = x;
        scores.tangents[t][i] = dx;
      }
    }
    return scores;
  }

  // As OnlineSoftmax::accumulate.
  template <int kKeys>
  void accumulate(thread const AttentionParameters& p, thread const RowRules& rules,
                  TangentScores<kKeys> scores, int key0, threadgroup const float* values,
                  threadgroup const float* value_tangents, thread const Rows& value_rows,
                  thread const Rows& value_tangent_rows, bool is_dirty, ushort lane) thread {
    if (scores.used == 0) return;
    const Place place(lane);
    float largest = maximum;
    for (int t = 0; t < kKeys / 8; ++t) {
      if ((scores.used >> t & 1) == 0) continue;
      largest = max(max(largest, scores.logits[t].x), scores.logits[t].y);
    }
    largest = ceil(row_max(largest));
    const float rescale =
        largest == maximum ? 1.0f : power_of_two(clamp(maximum - largest, -126.0f, 0.0f));
    maximum = largest;
    const float subtracted = isinf(largest) ? 0.0f : largest;
    sum *= rescale;
    tangent_sum *= rescale;
    if (simd_any(rescale != 1.0f)) {
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.V) continue;
        for (int i = 0; i < 2; ++i) {
          out[d].thread_elements()[i] *= rescale;
          out_tangent[d].thread_elements()[i] *= rescale;
        }
      }
    }
    for (int t = 0; t < kKeys / 8; ++t) {
      if ((scores.used >> t & 1) == 0) continue;
      const int first = key0 + 8 * t;
      float weights[2], moved[2];
      for (int i = 0; i < 2; ++i) {
        weights[i] = probability(scores.logits[t][i], subtracted);
        // Where p is 0, the tangent may be NaN.
        moved[i] = weights[i] == 0.0f ? 0.0f : weights[i] * scores.tangents[t][i];
        sum += weights[i];
        tangent_sum += moved[i];
        if (!rules.dropout.keeps(first + place.column + i)) weights[i] = moved[i] = 0.0f;
      }
      const Matrix<float> left = matrix_of<float>(weights[0], weights[1]);
      const Matrix<float> left_tangent = matrix_of<float>(moved[0], moved[1]);
      for (int d = 0; d < D / 8; ++d) {
        if (8 * d >= p.V) continue;
        const int at = 8 * t * kStride + 8 * d;
        Matrix<float> right;
        simdgroup_load(right, values + at, kStride, ulong2(0), false);
        simdgroup_multiply_accumulate(out[d], left, right, out[d]);
        if (moves_logits()) {
          simdgroup_multiply_accumulate(out_tangent[d], left_tangent, right, out_tangent[d]);
        }
        if (!has_value) continue;
        simdgroup_load(right, value_tangents + at, kStride, ulong2(0), false);
        simdgroup_multiply_accumulate(out_tangent[d], left, right, out_tangent[d]);
      }
      if (!is_dirty) continue;
      add_nonfinite<D>(value_rows, first, p.S, weights, out, lane);
      if (moves_logits()) add_nonfinite<D>(value_rows, first, p.S, moved, out_tangent, lane);
      add_nonfinite<D>(value_tangent_rows, first, p.S, weights, out_tangent, lane);
    }
  }
};

template <typename M, int D>
kernel void attention_tangent(JAX_GLUON_OPERANDS, device uchar* out [[buffer(kOut)]],
                              device float* row_maximum [[buffer(kRowMaximum)]],
                              device float* log2_sum [[buffer(kLog2Sum)]],
                              device uchar* out_tangent [[buffer(kOutTangent)]],
                              device float* log_sum_exp_tangent [[buffer(kLogSumExpTangent)]],
                              device const uchar* query_tangent [[buffer(kQueryTangent)]],
                              device const uchar* key_tangent [[buffer(kKeyTangent)]],
                              device const uchar* value_tangent [[buffer(kValueTangent)]],
                              device const uchar* bias_tangent [[buffer(kBiasTangent)]],
                              JAX_GLUON_THREAD) {
  JAX_GLUON_KEY_VALUE_TILES(M, D);
  constexpr int kKeys = BlockSizes<M, D>::kTileRows;
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const Place place(lane);
  const int n = group.y, b = group.z, k = n / (p.N / p.K);
  Rows keys = operands.key_rows(b, k), values = operands.value_rows(b, k);
  keys.adds_center = values.adds_center = true;
  const Rows query_tangents =
      tangent_rows(operands, query_tangent, p.query_tangent_type, p.query_tangent, p.H,
                   operands.batch_offset(kQueryTangentBatch, b), n);
  const Rows key_tangents = tangent_rows(operands, key_tangent, p.key_tangent_type, p.key_tangent,
                                         p.H, operands.batch_offset(kKeyTangentBatch, b), k);
  const Rows value_tangents =
      tangent_rows(operands, value_tangent, p.value_tangent_type, p.value_tangent, p.V,
                   operands.batch_offset(kValueTangentBatch, b), k);
  const HeadRules head_rules(operands, b, n);
  const Visibility visibility = head_rules.visibility;
  const int block_row = group.x * kBlockRows, first_row = block_row + 8 * simdgroup;
  const int row = first_row + place.row;
  const Range block_keys = visibility.of_rows({block_row, min(block_row + kBlockRows, p.T)});
  const Range seen = visibility.of_rows({first_row, min(first_row + 8, p.T)});
  const RowRules rules = head_rules.row(p, row);
  TangentRows<D> rows;
  rows.start(operands.query_rows(b, n), query_tangents, row, p.T, lane);
  rows.has_query = p.query_tangent_type != JAX_GLUON_NO_TANGENT;
  rows.has_key = p.key_tangent_type != JAX_GLUON_NO_TANGENT;
  rows.has_value = p.value_tangent_type != JAX_GLUON_NO_TANGENT;
  rows.has_bias = p.bias_tangent_type != JAX_GLUON_NO_TANGENT;
  rows.bias_tangent = bias_tangent;
  if (rows.has_bias) {
    const Int64 at = operands.batch_offset(kBiasTangentBatch, b) + n * p.bias_tangent.head +
                     row * p.bias_tangent.row;
    rows.bias_tangent += at * (p.bias_tangent_type == kF32 ? 4 : 2);
  }

  for (int key0 = tiles.start(keys, values, block_keys, thread_index); key0 < block_keys.end;
       key0 += kKeys) {
    tiles.template load<false, false>(keys, key_tangents, key0, block_keys.end, thread_index);
    const TangentScores<kKeys> scores =
        rows.template score<kKeys>(p, rules, seen, key0, tiles.keys, tiles.values, lane);
    // In this order each operand of codes has the columns that are staged for it.
    const bool is_dirty =
        tiles.template load<true, true>(value_tangents, values, key0, block_keys.end, thread_index);
    rows.template accumulate<kKeys>(p, rules, scores, key0, tiles.values, tiles.keys, values,
                                    value_tangents, is_dirty, lane);
  }

  float sum = row_sum(rows.sum);
  const float tangent_sum = row_sum(rows.tangent_sum);
  if (row >= p.T) return;
  if (rows.maximum == INFINITY) sum = NAN;
  // NaN is not empty.
  const bool is_empty = rows.maximum == -INFINITY && !isnan(sum);
  const float sink = sink_of(operands, b, n);
  RowTotal total = {sum, 1.0f, 0.0f, JAX_GLUON_EMPTY_ROW_LOG2_SUM};
  if (!is_empty) total = total_of(sum, rows.maximum, sink);
  // The tangent of the log-sum-exp; that of the sink where a row sees no key.
  float mean = is_empty ? 0.0f : tangent_sum / total.divisor;
  if (p.has_sinks_tangent != 0) {
    const float p_sink =
        is_empty ? (sink > -INFINITY ? 1.0f : 0.0f) : exp2((sink - total.maximum) - total.log2_sum);
    if (p_sink != 0.0f) mean += p_sink * operands.sink_tangent(b, n);
  }
  const Int64 index = (Int64(b) * p.T + row) * p.N + n;
  const float kept = p.dropout_threshold != 0 ? p.dropout_scale : 1.0f;
  for (int d = 0; d < D / 8; ++d) {
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      if (column >= p.V) continue;
      float x = 0.0f, dx = 0.0f;
      if (!is_empty) {
        x = rows.out[d].thread_elements()[i] / total.divisor * kept;
        dx = rows.out_tangent[d].thread_elements()[i] / total.divisor * kept;
        // Without tangents of logits none is taken out, even if the output is not finite.
        if (mean != 0.0f) dx -= mean * x;
      }
      store_float(out, p.out_type, index * p.V + column, x);
      store_float(out_tangent, p.out_tangent_type, index * p.V + column, dx);
    }
  }
  if (place.column == 0) {
    row_maximum[index] = total.maximum;
    log2_sum[index] = total.log2_sum;
    log_sum_exp_tangent[index] = mean;
  }
}

JAX_GLUON_INSTANTIATE_ALL(attention_tangent, float)
