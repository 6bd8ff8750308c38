// Floats to codes of every format. Where tokens share no scales with others of a distant block, one
// kernel does all; where all of them do, there is one for extremes, one for scales and one for
// codes. Means come before either.
#include <metal_stdlib>

using namespace metal;

#include "quantize.h"

// clang-format off
#define JAX_GLUON_QUANTIZE                                                                         \
  constant QuantizeParameters& parameters [[buffer(kQuantizeParameters)]],                         \
  device const Int64* batch_offsets [[buffer(kQuantizeBatchOffsets)]],                             \
  device const uchar* x [[buffer(kQuantizeInput)]],                                                \
  device const uchar* visible [[buffer(kQuantizeVisible)]],                                        \
  device uchar* data [[buffer(kQuantizeData)]],                                                    \
  device uchar* scale [[buffer(kQuantizeScale)]],                                                  \
  device uchar* offset [[buffer(kQuantizeOffset)]],                                                \
  device float* center [[buffer(kQuantizeCenter)]],                                                    \
  device float* extremes [[buffer(kQuantizeExtremes)]],                                            \
  uint3 group [[threadgroup_position_in_grid]],                                                    \
  ushort simdgroup [[simdgroup_index_in_threadgroup]],                                             \
  ushort lane [[thread_index_in_simdgroup]]

#define JAX_GLUON_MAKE_QUANTIZER                                                                   \
  threadgroup float memory[kSimdgroups * 3 * kMaxQuantizedColumns];                                \
  threadgroup float* own = memory + simdgroup * 3 * kMaxQuantizedColumns;                                  \
  constant QuantizeParameters& p = parameters;                                                     \
  const Quantizer quantizer{                                                                       \
      {&parameters, batch_offsets, x, visible, data, scale, offset, center, extremes},                         \
      {own, own + kMaxQuantizedColumns, own + 2 * kMaxQuantizedColumns},                                           \
      lane}
// clang-format on

// The center of each column of a head: the lower median of the finite values of the first tokens
// that can be seen. Any finite number keeps softmax's invariance exact, and a NaN in one token must
// not reach the others. A threadgroup has one head; its simdgroups load a row each, and its threads
// sort a column each as the rows come. With powers, the norm of an ordinary token after that.
kernel void quantize_center(JAX_GLUON_QUANTIZE,
                            ushort thread_index [[thread_index_in_threadgroup]]) {
  static_assert(kSimdgroups * kMaxQuantizedColumns + kCenterRows * kThreads <=
                    kSimdgroups * 3 * kMaxQuantizedColumns,
                "rows and sorted columns share the memory");
  JAX_GLUON_MAKE_QUANTIZER;
  threadgroup int tokens[kCenterRows];
  threadgroup int token_count;
  const int k = group.x, b = group.y;
  if (simdgroup == 0) {
    int found = 0;
    for (int first = 0; first < p.S && found < kCenterRows; first += 32) {
      const int i = first + lane;
      const int is_found = i < p.S && quantizer.is_visible(b, i) ? 1 : 0;
      const int place = found + simd_prefix_exclusive_sum(is_found);
      if (is_found != 0 && place < kCenterRows) tokens[place] = i;
      found += simd_sum(is_found);
    }
    if (lane == 0) token_count = min(found, int(kCenterRows));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int count = token_count;
  Quantizer loader = quantizer;
  loader.columns.row = memory + simdgroup * kMaxQuantizedColumns;
  threadgroup float* sorted = memory + kSimdgroups * kMaxQuantizedColumns + thread_index;
  for (int first_column = 0; first_column < p.H; first_column += kThreads) {
    const int h = first_column + thread_index;
    int finite = 0;
    for (int round = 0; round < count; round += kSimdgroups) {
      if (round + simdgroup < count) loader.load_whole(b, tokens[round + simdgroup], k);
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows are loaded
      for (int row = 0; row < min(int(kSimdgroups), count - round) && h < p.H; ++row) {
        const float element = memory[row * kMaxQuantizedColumns + h];
        if (!isfinite(element)) continue;
        int at = finite++;
        for (; at > 0 && sorted[(at - 1) * kThreads] > element; --at) {
          sorted[at * kThreads] = sorted[(at - 1) * kThreads];
        }
        sorted[at * kThreads] = element;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows are used
    }
    if (h < p.H) {
      const float median = finite > 0 ? sorted[(finite - 1) / 2 * kThreads] : 0.0f;
      center[(Int64(b) * p.K + k) * p.H + h] = abs(median) <= kLargestCenter ? median : 0.0f;
    }
  }
  if (p.has_powers == 0) return;
  threadgroup float norms[kCenterRows];
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);  // the center is stored
  for (int row = simdgroup; row < count; row += kSimdgroups) {
    loader.load(b, tokens[row], k);
    const float norm = loader.norm();
    if (lane == 0) norms[row] = norm;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the norms are there
  if (thread_index != 0) return;
  int finite = 0;
  for (int row = 0; row < count; ++row) {
    const float norm = norms[row];
    if (!isfinite(norm)) continue;
    int at = finite++;
    for (; at > 0 && norms[at - 1] > norm; --at) norms[at] = norms[at - 1];
    norms[at] = norm;
  }
  const float median = finite > 0 ? norms[(finite - 1) / 2] : 0.0f;
  extremes[Int64(b) * p.K + k] =
      median >= kMinOrdinaryNorm && median <= kLargestCenter ? median : 0.0f;
}

// Scales and codes of blocks of tokens: one of a head in each simdgroup.
kernel void quantize_blocks(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int block = group.x * kSimdgroups + simdgroup, k = group.y, b = group.z;
  const int begin = block * p.token_block, end = min(begin + p.token_block, p.S);
  if (begin >= p.S) return;
  quantizer.clear_extremes();
  for (int i = begin; i < end; ++i) {
    quantizer.load(b, i, k);
    quantizer.divide(b, k);
    quantizer.add_extremes(b, i);
  }
  const Int64 index = quantizer.block_index(b, block, k);
  quantizer.make_parameters(index);
  uint powers = 0;  // of a number
  for (int i = begin; i < end; ++i) {
    if (end - begin > 1 || p.has_powers != 0) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      quantizer.load(b, i, k);
      const int place = (i - begin) % kPowersInCell;
      powers = (place == 0 ? 0 : powers) | uint(quantizer.divide(b, k)) << 3 * place;
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (p.has_powers != 0) {
        quantizer.store_power_cell(index, (i - begin) / kPowersInCell, powers);
      }
    }
    quantizer.store_codes(b, i, k);
  }
  const int used = (end - begin + kPowersInCell - 1) / kPowersInCell;
  for (int cell = used; cell < quantizer.power_cells(); ++cell) {
    quantizer.store_power_cell(index, cell, 0);
  }
}

// Extremes of the columns of a head over a chunk of tokens.
kernel void quantize_extremes(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int chunk = group.x * kSimdgroups + simdgroup, k = group.y, b = group.z;
  if (chunk >= p.chunks) return;
  const int tokens = (p.S + p.chunks - 1) / p.chunks;
  quantizer.clear_extremes();
  for (int i = chunk * tokens; i < min((chunk + 1) * tokens, p.S); ++i) {
    quantizer.load(b, i, k);
    quantizer.add_extremes(b, i);
  }
  device float* out = extremes + ((Int64(b) * p.K + k) * p.chunks + chunk) * 2 * p.H;
  for (int h = lane; h < p.H; h += 32) {
    out[h] = quantizer.columns.first[h];
    out[p.H + h] = quantizer.columns.second[h];
  }
}

// Scales of a head from the extremes of its chunks, or of all heads and batch entries that share a
// tensor's. The first simdgroup works.
kernel void quantize_parameters(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  if (simdgroup != 0) return;
  const int k = group.x, b = group.y;
  const int first =
      p.is_per_tensor != 0 ? b / p.batch_per_map * p.batch_per_map * p.K : b * p.K + k;
  const int heads = p.is_per_tensor != 0 ? p.batch_per_map * p.K : 1;
  quantizer.clear_extremes();
  for (Int64 chunk = Int64(first) * p.chunks; chunk < Int64(first + heads) * p.chunks; ++chunk) {
    device const float* from = extremes + chunk * 2 * p.H;
    for (int h = lane; h < p.H; h += 32) {
      quantizer.columns.first[h] = lower(quantizer.columns.first[h], from[h]);
      quantizer.columns.second[h] = higher(quantizer.columns.second[h], from[p.H + h]);
    }
  }
  quantizer.make_parameters(quantizer.block_index(b, 0, k));
}

// Codes of rows whose scales are stored: one row in each simdgroup.
kernel void quantize_codes(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int i = group.x * kSimdgroups + simdgroup, k = group.y, b = group.z;
  if (i >= p.S) return;
  quantizer.load_parameters(quantizer.block_index(b, 0, k));
  quantizer.load(b, i, k);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  quantizer.store_codes(b, i, k);
}
