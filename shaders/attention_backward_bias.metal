// Gradient of the bias: dS, summed over the axes that the bias broadcasts. A threadgroup owns a
// block of the bias and walks everything that is summed into it, in a fixed order. Where delta is
// refined, the kernel runs twice: first with `finds_statistics`, as if for a bias [B, N, T, 1], of
// whose blocks it writes the statistics of the rows.
#include <metal_stdlib>

using namespace metal;

#include "backward_rows.h"
#include "instantiate.h"

template <typename M, int D>
kernel void attention_backward_bias(JAX_GLUON_OPERANDS, JAX_GLUON_COTANGENTS,
                                    device RowStatistics* statistics [[buffer(kRowStatistics)]],
                                    device uchar* bias_gradient [[buffer(kBiasGradient)]],
                                    JAX_GLUON_THREAD) {
  using Sizes = BlockSizes<M, D>;
  JAX_GLUON_KEY_VALUE_TILES(M, D);
  threadgroup float partial[kSimdgroups * Sizes::kTileRows];

  const AttentionParameters p = parameters;
  const uint3 group = JAX_GLUON_GROUP;
  const Operands operands = JAX_GLUON_MAKE_OPERANDS;
  const Cotangents cotangents = JAX_GLUON_MAKE_COTANGENTS;
  const Place place(lane);
  const bool sums_rows = p.bias_rows == 1, sums_keys = p.bias_keys == 1;
  const int bias_head = group.z % p.bias_heads, rest = group.z / p.bias_heads;
  const int bias_batch = rest % p.bias_batches, map = rest / p.bias_batches;
  const Range batches =
      p.bias_batches == 1 ? Range{0, p.batch_per_map} : Range{bias_batch, bias_batch + 1};
  const Range heads = p.bias_heads == 1 ? Range{0, p.N} : Range{bias_head, bias_head + 1};
  const int row_begin = group.x * kBlockRows, key_begin = group.y * Sizes::kTileRows;
  const int row_end = sums_rows ? p.T : min(row_begin + kBlockRows, p.T);
  const int key_end = sums_keys ? p.S : min(key_begin + Sizes::kTileRows, p.S);

  // dS at the keys of each matrix, or, where keys are summed, all of it in the first.
  float2 sum[Sizes::kTileRows / 8];
  for (int t = 0; t < Sizes::kTileRows / 8; ++t) sum[t] = 0.0f;
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    const int b = map * p.batch_per_map + batch;
    for (int n = heads.begin; n < heads.end; ++n) {
      const int k = n / (p.N / p.K);
      const Rows keys = operands.key_rows(b, k), values = operands.value_rows(b, k);
      const HeadRules head_rules(operands, b, n);
      const Visibility visibility = head_rules.visibility;
      for (int block_row = row_begin; block_row < row_end; block_row += kBlockRows) {
        const Range block_keys =
            intersect(visibility.of_rows({block_row, min(block_row + kBlockRows, row_end)}),
                      {key_begin, key_end});
        if (block_keys.is_empty()) continue;
        const int first_row = block_row + 8 * simdgroup, row = first_row + place.row;
        const Range seen =
            intersect(visibility.of_rows({first_row, min(first_row + 8, row_end)}), block_keys);
        const RowRules rules = head_rules.row(p, row);
        BackwardRows<M, D> rows;
        rows.start(operands, cotangents, b, n, row, lane);
        const Int64 at = (Int64(b) * p.N + n) * p.T + row;
        if (refines_delta() && p.finds_statistics == 0 && row < p.T) {
          rows.statistics = statistics[at];
        }
        // A tile of its own keys starts at a multiple of kTileRows; `start` may only say so too.
        const Range walked = {sums_keys ? block_keys.begin : key_begin, block_keys.end};
        for (int key0 = tiles.start(keys, values, walked, thread_index); key0 < block_keys.end;
             key0 += Sizes::kTileRows) {
          tiles.template load<false, false>(keys, values, key0, block_keys.end, thread_index);
          for (int t = 0; t < Sizes::kTileRows / 8; ++t) {
            const int first = key0 + 8 * t, own = first + place.column;
            const int tile_at = 8 * t * Sizes::kStride;
            const ScoreProducts made = rows.multiply(p, rules, seen, first, tiles.keys + tile_at,
                                                     tiles.values + tile_at, lane);
            if (!made.is_used) continue;
            for (int i = 0; i < 2; ++i) {
              const ScoreGradient score =
                  score_gradient(p, rules, rows.statistics, own + i, made.is_seen[i],
                                 made.product[i], made.probability_gradient[i]);
              sum[sums_keys ? 0 : t][i] += score.gradient();
              if (refines_delta()) rows.remainder.add(score);
            }
          }
        }
        if (refines_delta() && p.finds_statistics != 0) {
          rows.statistics.delta += rows.remainder.of_row(rows.log_sum_exp_gradient);
          if (row < p.T && place.column == 0) statistics[at] = rows.statistics;
        }
      }
    }
  }

  if (p.finds_statistics != 0) return;
  if (sums_keys) sum[0] = float2(row_sum(sum[0].x + sum[0].y), 0.0f);
  const int matrices = sums_keys ? 1 : Sizes::kTileRows / 8;
  const int columns = sums_keys ? 1 : Sizes::kTileRows;
  if (sums_rows) {
    // Lanes of a column differ in bits 1, 2 and 4.
    for (int t = 0; t < matrices; ++t) {
      for (ushort bit = 2; bit <= 16; bit *= bit == 4 ? 4 : 2)
        sum[t] += simd_shuffle_xor(sum[t], bit);
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * t + place.column + i;
        if (place.row == 0 && column < columns) {
          partial[simdgroup * Sizes::kTileRows + column] = sum[t][i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < columns && key_begin + thread_index < p.bias_keys) {
      float total = 0.0f;
      for (int s = 0; s < kSimdgroups; ++s) total += partial[s * Sizes::kTileRows + thread_index];
      store_float(bias_gradient, p.bias_gradient_type,
                  Int64(group.z) * p.bias_keys + key_begin + thread_index, total);
    }
    return;
  }
  const int row = row_begin + 8 * simdgroup + place.row;
  if (row >= p.T) return;
  for (int t = 0; t < matrices; ++t) {
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * t + place.column + i, key = key_begin + column;
      if (column >= columns || key >= p.bias_keys) continue;
      store_float(bias_gradient, p.bias_gradient_type,
                  (Int64(group.z) * p.bias_rows + row) * p.bias_keys + key, sum[t][i]);
    }
  }
}

JAX_GLUON_INSTANTIATE_ALL(attention_backward_bias, float)
