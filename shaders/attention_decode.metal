// Attention of few query rows over many keys: the keys are split among threadgroups, and the query
// rows of all heads that read a kv head share its rows, so that keys and values are read once for
// eight of them. A second kernel puts the parts together.
#include <metal_stdlib>

using namespace metal;

#include "instantiate.h"
#include "online_softmax.h"

// Row r of a kv head is token r / heads of query head r % heads of its group. The simdgroups of a
// threadgroup have the same rows, and share the matrices of each tile: each makes a part of its
// own.
template <typename M, int D>
kernel void attention_decode(JAX_GLUON_OPERANDS, device float* partial_out [[buffer(kPartialOut)]],
                             device PartialStatistics* partial [[buffer(kPartialStatistics)]],
                             JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  // Keys of a tile that one simdgroup takes.
  constexpr int kShare = Sizes::kTileRows < 8 * kSimdgroups ? 8 : Sizes::kTileRows / kSimdgroups;
  JAX_GLUON_KEY_VALUE_TILES(M, D);

  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const int k = group.y, b = group.z, heads = p.N / p.K, rows = p.T * heads;
  const int split = group.x % p.splits, first_row = group.x / p.splits * 8;
  const Rows keys = operands.key_rows(b, k), values = operands.value_rows(b, k);
  const Place place(lane);
  const int row = first_row + place.row;
  const int token = row < rows ? row / heads : p.T, n = k * heads + row % heads;
  const HeadRules head_rules(operands, b, n);
  const RowRules rules = head_rules.row(p, token);

  OnlineSoftmax<M, D> softmax;
  softmax.start(operands, operands.query_rows(b, n), keys, token, p.T, lane);
  const Range split_keys = {split * p.split_keys, min((split + 1) * p.split_keys, p.S)};
  const Range seen =
      intersect(head_rules.visibility.of_rows(
                    {first_row / heads, (min(first_row + 8, rows) + heads - 1) / heads}),
                split_keys);
  for (int key0 = tiles.start(keys, values, seen, thread_index); key0 < seen.end;
       key0 += tiles.kRows) {
    const bool values_are_dirty =
        tiles.template load<false, true>(keys, values, key0, seen.end, thread_index);
    const int first = key0 + kShare * simdgroup;
    const int last = min(first + kShare, key0 + Sizes::kTileRows);
    softmax.attend(p, rules, intersect(seen, {first, last}), key0, tiles, keys, values,
                   values_are_dirty, lane);
  }

  const float sum = softmax.total();
  if (row >= rows) return;
  const int parts = p.splits * kSimdgroups, part = split * kSimdgroups + simdgroup;
  const Int64 index = ((Int64(b) * p.K + k) * parts + part) * rows + row;
  for (int d = 0; 8 * d < p.V; ++d) {
    const float2 x = softmax.result(values, d, 1.0f, lane);
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      if (column < p.V) partial_out[index * p.V + column] = x[i];
    }
  }
  if (place.column == 0) {
    const float center = needs_whole_logits(p) ? 0.0f : softmax.center;
    partial[index] = {softmax.maximum + center, sum};
  }
}

// A threadgroup has one row.
kernel void attention_decode_combine(
    JAX_GLUON_OPERANDS, device const float* partial_out [[buffer(kPartialOut)]],
    device const PartialStatistics* partial [[buffer(kPartialStatistics)]],
    device uchar* out [[buffer(kOut)]], device float* row_maximum [[buffer(kRowMaximum)]],
    device float* log2_sum [[buffer(kLog2Sum)]], JAX_GLUON_THREAD) {
  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const int row = group.x, k = group.y, b = group.z, heads = p.N / p.K, rows = p.T * heads;
  const int parts = p.splits * kSimdgroups;
  const Int64 first = (Int64(b) * p.K + k) * parts * rows + row;
  const Rows values = operands.value_rows(b, k);
  float maximum = -INFINITY;
  for (int part = 0; part < parts; ++part) {
    maximum = max(maximum, partial[first + Int64(part) * rows].maximum);
  }
  const float subtracted = maximum == -INFINITY ? 0.0f : maximum;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) {
    const PartialStatistics one = partial[first + Int64(part) * rows];
    sum += one.sum * exp2(one.maximum - subtracted);
  }
  const bool is_empty = maximum == -INFINITY && !isnan(sum);
  const RowTotal total = total_of(sum, subtracted, sink_of(operands, b, k * heads + row % heads));
  const Int64 index = row_index(p, b, row / heads, p.T, k * heads + row % heads, p.N);
  for (int column = thread_index; column < p.V; column += kThreads) {
    float x = 0.0f;
    for (int part = 0; part < parts; ++part) {
      const Int64 at = first + Int64(part) * rows;
      // A part without a visible key has no say, whatever it holds.
      const float weight = exp2(partial[at].maximum - subtracted);
      if (weight != 0.0f) x += weight * partial_out[at * p.V + column];
    }
    x = is_empty ? 0.0f : x / total.divisor + values.center_at(column) * total.share;
    store_float(out, p.out_type, index * p.V + column, x);
  }
  if (thread_index == 0) {
    row_maximum[index] = is_empty ? 0.0f : total.maximum;
    log2_sum[index] = is_empty ? JAX_GLUON_EMPTY_ROW_LOG2_SUM : total.log2_sum;
  }
}

JAX_GLUON_INSTANTIATE_ALL(attention_decode, float)
JAX_GLUON_INSTANTIATE_ALL(attention_decode, half)
#ifdef __HAVE_BFLOAT__
JAX_GLUON_INSTANTIATE_ALL(attention_decode, bfloat)
#endif
