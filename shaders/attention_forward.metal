// Flash attention forward: a threadgroup owns a block of query rows of one head and walks the keys
// that any of them sees. Two pipelines: one loads tiles and then uses them; the other, gluon, fills
// a ring ahead, and makes the scores of one subtile while it uses those of the one before.
#include <metal_stdlib>

using namespace metal;

#include "instantiate.h"
#include "online_softmax.h"
#include "ring.h"

// What both pipelines have of a simdgroup.
template <typename M, int D>
struct ForwardRows {
  OnlineSoftmax<M, D> softmax;
  Rows keys;
  Rows values;
  RowRules rules;    // of the lane's row
  Range block_keys;  // that any row of the threadgroup sees
  Range seen;        // that any row of the simdgroup sees
  int b;
  int n;
  int row;

  ForwardRows(thread const Operands& operands, uint3 group, ushort simdgroup, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    n = group.y;
    b = group.z;
    const int k = n / (p.N / p.K);
    keys = operands.key_rows(b, k);
    values = operands.value_rows(b, k);
    const HeadRules head_rules(operands, b, n);
    const Visibility visibility = head_rules.visibility;
    const int block_row = group.x * kBlockRows, first_row = block_row + 8 * simdgroup;
    row = first_row + Place(lane).row;
    softmax.start(operands, operands.query_rows(b, n), keys, row, p.T, lane);
    rules = head_rules.row(p, row);
    block_keys = visibility.of_rows({block_row, min(block_row + kBlockRows, p.T)});
    seen = visibility.of_rows({first_row, min(first_row + 8, p.T)});
  }

  void store(thread const Operands& operands, device uchar* out, device float* row_maximum,
             device float* log2_sum, ushort lane) thread {
    thread const AttentionParameters& p = *operands.parameters;
    const Place place(lane);
    const float sum = softmax.total();
    if (row >= p.T) return;
    // NaN is not empty.
    const bool is_empty = softmax.maximum == -INFINITY && !isnan(sum);
    RowTotal total = {sum, 1.0f, 0.0f, JAX_GLUON_EMPTY_ROW_LOG2_SUM};
    if (!is_empty) {
      const float center = needs_whole_logits(p) ? 0.0f : softmax.center;
      total = total_of(sum, softmax.maximum + center, sink_of(operands, b, n));
    }
    const Int64 index = row_index(p, b, row, p.T, n, p.N);
    for (int d = 0; 8 * d < p.V; ++d) {
      const float2 x = softmax.result(values, d, total.divisor, lane);
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * d + place.column + i;
        if (column >= p.V) continue;
        const bool adds_center = !is_empty && !values.adds_center;
        const float center = adds_center ? values.center_at(column) * total.share : 0.0f;
        const float kept = p.dropout_threshold != 0 ? x[i] * p.dropout_scale : x[i];
        store_float(out, p.out_type, index * p.V + column, kept + center);
      }
    }
    if (place.column == 0) {
      row_maximum[index] = total.maximum;
      log2_sum[index] = total.log2_sum;
    }
  }
};

// clang-format off
#define JAX_GLUON_FORWARD_OUTPUTS                                                                  \
  device uchar* out [[buffer(kOut)]],                                                              \
  device float* row_maximum [[buffer(kRowMaximum)]],                                               \
  device float* log2_sum [[buffer(kLog2Sum)]]
// clang-format on

template <typename M, int D>
kernel void attention_forward(JAX_GLUON_OPERANDS, JAX_GLUON_FORWARD_OUTPUTS, JAX_GLUON_THREAD) {
  JAX_GLUON_KEY_VALUE_TILES(M, D);
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  ForwardRows<M, D> rows(JAX_GLUON_MAKE_OPERANDS, group, simdgroup, lane);
  const Rows keys = rows.keys, values = rows.values;
  const int end = rows.block_keys.end;
  for (int key0 = tiles.start(keys, values, rows.block_keys, thread_index); key0 < end;
       key0 += tiles.kRows) {
    const bool values_are_dirty =
        tiles.template load<false, true>(keys, values, key0, end, thread_index);
    rows.softmax.attend(p, rows.rules, rows.seen, key0, tiles, keys, values, values_are_dirty,
                        lane);
  }
  rows.store(JAX_GLUON_MAKE_OPERANDS, out, row_maximum, log2_sum, lane);
}

template <typename M, int D>
kernel void attention_forward_gluon(JAX_GLUON_OPERANDS, JAX_GLUON_FORWARD_OUTPUTS,
                                    JAX_GLUON_THREAD) {
  using Sizes = RingSizes<M, D>;
  using KeysAndValues = KeyValueRing<M, D, Sizes::kKeySlots, false, true>;
  constexpr int kSubtile = Sizes::kSubtileRows, kRows = Sizes::kGranuleRows;
  threadgroup typename KeysAndValues::Memory memory;
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  ForwardRows<M, D> rows(JAX_GLUON_MAKE_OPERANDS, group, simdgroup, lane);
  const Rows keys = rows.keys, values = rows.values;
  KeysAndValues ring;
  ring.start(&memory, keys, values, rows.block_keys, thread_index);
  Scores<kSubtile> scores;
  scores.used = 0;
  if (Sizes::kLooksAhead && ring.count > 0) {
    scores = rows.softmax.template score<kSubtile>(p, rows.rules, rows.seen, ring.first,
                                                   ring.keys.rows_of(0, 0),
                                                   ring.keys.scales_of(0, 0), keys, lane);
  }
  for (int i = 0; i < ring.count; ++i) {
    ring.prefetch(keys, values, i, thread_index);
    const bool values_are_dirty = ring.values.is_dirty(i, lane);
    for (int t = 0; t < kRows; t += kSubtile) {
      // The subtile whose scores are made now.
      const int made = Sizes::kLooksAhead ? t + kSubtile : t;
      const int granule = made < kRows ? i : i + 1, at = made < kRows ? made : made - kRows;
      const Scores<kSubtile> next = rows.softmax.template score<kSubtile>(
          p, rows.rules, rows.seen, ring.token(granule) + at, ring.keys.rows_of(granule, at),
          ring.keys.scales_of(granule, at), keys, lane);
      rows.softmax.accumulate(p, rows.rules, Sizes::kLooksAhead ? scores : next, ring.token(i) + t,
                              ring.values.rows_of(i, t), ring.values.scales_of(i, t), values,
                              values_are_dirty, lane);
      scores = next;
    }
    ring.advance(keys, values, i, thread_index);
  }
  rows.store(JAX_GLUON_MAKE_OPERANDS, out, row_maximum, log2_sum, lane);
}

JAX_GLUON_INSTANTIATE_ALL(attention_forward, float)
JAX_GLUON_INSTANTIATE_ALL(attention_forward_gluon, float)
JAX_GLUON_INSTANTIATE_ALL(attention_forward, half)
JAX_GLUON_INSTANTIATE_ALL(attention_forward_gluon, half)
#ifdef __HAVE_BFLOAT__
JAX_GLUON_INSTANTIATE_ALL(attention_forward, bfloat)
JAX_GLUON_INSTANTIATE_ALL(attention_forward_gluon, bfloat)
#endif
