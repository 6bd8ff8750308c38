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
  device const int* lengths [[buffer(kQuantizeLengths)]],                                          \
  device uchar* data [[buffer(kQuantizeData)]],                                                    \
  device uchar* scale [[buffer(kQuantizeScale)]],                                                  \
  device uchar* offset [[buffer(kQuantizeOffset)]],                                                \
  device float* mean [[buffer(kQuantizeMean)]],                                                    \
  uint3 group [[threadgroup_position_in_grid]],                                                    \
  ushort simdgroup [[simdgroup_index_in_threadgroup]],                                             \
  ushort lane [[thread_index_in_simdgroup]]

#define JAX_GLUON_MAKE_QUANTIZER                                                                   \
  threadgroup float memory[kSimdgroups * 3 * kMostQuantizedColumns];                                \
  threadgroup float* own = memory + simdgroup * 3 * kMostQuantizedColumns;                                  \
  constant QuantizeParameters& p = parameters;                                                     \
  const Quantizer quantizer{                                                                       \
      {&parameters, batch_offsets, x, lengths, data, scale, offset, mean},                         \
      {own, own + kMostQuantizedColumns, own + 2 * kMostQuantizedColumns},                                           \
      lane}
// clang-format on

// Means over the first lengths[b] tokens, of finite values only: any finite number keeps softmax's
// invariance exact, and a NaN in one token must not reach the others. A threadgroup has one head;
// of 32 columns at a time, its simdgroups sum one token in four each, with what rounding takes away
// carried along. A rotated mean is the mean of the rotated rows.
kernel void quantize_mean(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int k = group.x, b = group.y;
  int tokens = p.S;
  if (p.has_lengths != 0) tokens = clamp(lengths[batch_offsets[p.B + b]], 0, p.S);
  const float share = 1.0f / float(max(tokens, 1));
  threadgroup float* sums = quantizer.columns.first;
  threadgroup float* counts = quantizer.columns.second;
  for (int h = lane; h < p.H; h += 32) {
    float sum = 0.0f, lost = 0.0f;
    int count = 0;
    for (int i = simdgroup; i < tokens; i += kSimdgroups) {
      const float element =
          load_float(x, p.x_type, batch_offsets[b] + i * p.x.token + k * p.x.head + h);
      if (!isfinite(element)) continue;
      const float term = element * share - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
      ++count;
    }
    sums[h] = sum;
    counts[h] = float(count);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0) return;
  for (int h = lane; h < p.H; h += 32) {
    float sum = 0.0f, count = 0.0f;
    for (int s = 0; s < kSimdgroups; ++s) {
      sum += sums[s * 3 * kMostQuantizedColumns + h];
      count += counts[s * 3 * kMostQuantizedColumns + h];
    }
    quantizer.columns.row[h] = count > 0.0f ? sum * (float(tokens) / count) : 0.0f;
  }
  if (p.is_rotated != 0) rotate_row(quantizer.columns.row, p.H, lane);
  for (int h = lane; h < p.H; h += 32) {
    mean[(Int64(b) * p.K + k) * p.H + h] = quantizer.columns.row[h];
  }
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
    quantizer.add_extremes();
  }
  quantizer.make_parameters(quantizer.scale_index(b, block, k));
  for (int i = begin; i < end; ++i) {
    if (end - begin > 1) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      quantizer.load(b, i, k);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    quantizer.store_codes(b, i, k);
  }
}

// Extremes of the columns of a head over a chunk of tokens.
kernel void quantize_extremes(JAX_GLUON_QUANTIZE,
                              device float* extremes [[buffer(kQuantizeExtremes)]]) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int chunk = group.x * kSimdgroups + simdgroup, k = group.y, b = group.z;
  if (chunk >= p.chunks) return;
  const int tokens = (p.S + p.chunks - 1) / p.chunks;
  quantizer.clear_extremes();
  for (int i = chunk * tokens; i < min((chunk + 1) * tokens, p.S); ++i) {
    quantizer.load(b, i, k);
    quantizer.add_extremes();
  }
  device float* out = extremes + ((Int64(b) * p.K + k) * p.chunks + chunk) * 2 * p.H;
  for (int h = lane; h < p.H; h += 32) {
    out[h] = quantizer.columns.first[h];
    out[p.H + h] = quantizer.columns.second[h];
  }
}

// Scales of a head from the extremes of its chunks, or of all heads and batch entries that share a
// tensor's. The first simdgroup works.
kernel void quantize_parameters(JAX_GLUON_QUANTIZE,
                                device const float* extremes [[buffer(kQuantizeExtremes)]]) {
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
  quantizer.make_parameters(quantizer.scale_index(b, 0, k));
}

// Codes of rows whose scales are stored: one row in each simdgroup.
kernel void quantize_codes(JAX_GLUON_QUANTIZE) {
  JAX_GLUON_MAKE_QUANTIZER;
  const int i = group.x * kSimdgroups + simdgroup, k = group.y, b = group.z;
  if (i >= p.S) return;
  quantizer.load_parameters(quantizer.scale_index(b, 0, k));
  quantizer.load(b, i, k);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  quantizer.store_codes(b, i, k);
}
