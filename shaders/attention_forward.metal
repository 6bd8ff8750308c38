// Flash attention forward: a threadgroup owns a block of query rows of one head and walks the keys
// that any of them sees.
#include <metal_stdlib>

using namespace metal;

#include "online_softmax.h"

template <typename M, int D>
kernel void attention_forward(JAX_GLUON_OPERANDS, device uchar* out [[buffer(kOut)]],
                              device float* row_maximum [[buffer(kRowMaximum)]],
                              device float* log2_sum [[buffer(kLog2Sum)]], JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  JAX_GLUON_KEY_VALUE_TILES(M, D);

  const AttentionParameters p = parameters;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const int n = group.y, b = group.z, k = n / (p.N / p.K);
  const Rows keys = operands.key_rows(b, k), values = operands.value_rows(b, k);
  const HeadRules head_rules(operands, b, n);
  const Visibility visibility = head_rules.visibility;
  const Place place(lane);

  const int block_row = group.x * kBlockRows, first_row = block_row + 8 * simdgroup;
  const int row = first_row + place.row;
  OnlineSoftmax<M, D> softmax;
  softmax.start(operands, operands.query_rows(b, n), keys, row, p.T, lane);
  const RowRules rules = head_rules.row(p, row);
  const Range block_keys = visibility.of_rows({block_row, min(block_row + kBlockRows, p.T)});
  const Range seen = visibility.of_rows({first_row, min(first_row + 8, p.T)});

  for (int key0 = tiles.start(keys, values, block_keys, thread_index); key0 < block_keys.end;
       key0 += tiles.kRows) {
    const bool values_are_dirty =
        tiles.template load<false, true>(keys, values, key0, block_keys.end, thread_index);
    softmax.attend(p, rules, seen, key0, tiles, keys, values, values_are_dirty, lane);
  }

  const float total = row_sum(softmax.sum);
  if (row >= p.T) return;
  // NaN is not empty.
  const bool is_empty = softmax.maximum == -INFINITY && !isnan(total);
  const Int64 index = (Int64(b) * p.T + row) * p.N + n;
  for (int d = 0; 8 * d < p.V; ++d) {
    const float2 x = softmax.result(values, d, total, lane);
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * d + place.column + i;
      if (column >= p.V) continue;
      const float mean = !is_empty ? values.mean_at(column) : 0.0f;
      store_float(out, p.out_type, index * p.V + column, x[i] + mean);
    }
  }
  if (place.column == 0) {
    const float centre = needs_whole_logits(p) ? 0.0f : softmax.centre;
    row_maximum[index] = is_empty ? 0.0f : softmax.maximum + centre;
    log2_sum[index] = is_empty ? JAX_GLUON_EMPTY_ROW_LOG2_SUM : log2(total);
  }
}

#define JAX_GLUON_INSTANTIATE(type, dim) \
  template [[host_name(                  \
      "attention_forward_" #type         \
      "_" #dim)]] kernel decltype(attention_forward<type, dim>) attention_forward<type, dim>;
#define JAX_GLUON_INSTANTIATE_ALL(type) \
  JAX_GLUON_INSTANTIATE(type, 64)       \
  JAX_GLUON_INSTANTIATE(type, 128)      \
  JAX_GLUON_INSTANTIATE(type, 256)

JAX_GLUON_INSTANTIATE_ALL(float)
JAX_GLUON_INSTANTIATE_ALL(half)
#ifdef __HAVE_BFLOAT__
JAX_GLUON_INSTANTIATE_ALL(bfloat)
#endif
