// Rows of floats to codes: the steps that the kernels of quantize.metal put together. A simdgroup
// works on rows of one head; it keeps the row at hand, and for each column the extremes, or later
// the scale and offset, in threadgroup memory of its own.
#pragma once

#include "operand.h"

static_assert(kSimdgroups * 3 * kMaxQuantizedColumns * sizeof(float) <= 32768,
              "threadgroup memory");
// A step below this counts as zero: dividing by it, or halving it, might leave the normal numbers.
constant constexpr float kMinScale = 2.35098870164e-38f;  // 2^-125
// A center above this counts as zero: differences from it might not be finite.
constant constexpr float kLargestCenter = 0x1p100f;

// A squared norm below this counts as zero: squares of its elements might not be normal.
constant constexpr float kMinOrdinaryNorm = 0x1p-100f;

// NaN where one is NaN; min and max would drop it.
inline float lower(float a, float b) { return isnan(a) || isnan(b) ? NAN : min(a, b); }
inline float higher(float a, float b) { return isnan(a) || isnan(b) ? NAN : max(a, b); }

// The smallest bfloat16 number that is not below finite x; NaN stays NaN.
inline float round_up_to_bfloat16(float x) {
  if (isnan(x)) return x;
  const uint bits = as_type<uint>(x);
  const float up = as_type<float>((bits >> 31 != 0 ? bits : bits + 0xffff) & 0xffff0000);
  const float largest = as_type<float>(0x7f7f0000u);
  return clamp(up, -largest, largest);
}

// Signs of the rotation: the lowest bit of SplitMix64 of h + 1.
inline float rotation_sign(int h) {
  ulong z = ulong(h + 1) * 0x9E3779B97F4A7C15ul;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ul;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBul;
  return ((z ^ (z >> 31)) & 1) != 0 ? -1.0f : 1.0f;
}

// Multiplies a row by the randomised Hadamard matrix: signs, then a Walsh-Hadamard transform of
// blocks of the largest power of two that divides the number of columns.
inline void rotate_row(threadgroup float* row, int columns, ushort lane) {
  const int block = columns & -columns;
  const float norm = 1.0f / precise::sqrt(float(block));
  for (int h = lane; h < columns; h += 32) row[h] *= rotation_sign(h) * norm;
  for (int half_block = 1; half_block < block; half_block *= 2) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int pair = lane; pair < columns / 2; pair += 32) {
      const int i = pair / half_block * 2 * half_block + pair % half_block;
      const float a = row[i], b = row[i + half_block];
      row[i] = a + b;
      row[i + half_block] = a - b;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

struct QuantizeOperands {
  constant QuantizeParameters* parameters;
  device const Int64* batch_offsets;
  device const uchar* x;
  device const uchar* visible;
  device uchar* data;
  device uchar* scale;
  device uchar* offset;
  device float* center;
  device float* ordinary_norm;  // of each head, where tokens are divided by powers
};

// A simdgroup's threadgroup memory.
struct Columns {
  threadgroup float* row;
  threadgroup float* first;   // smallest elements, then scales
  threadgroup float* second;  // largest elements, then offsets
};

struct Quantizer {
  QuantizeOperands operands;
  Columns columns;
  ushort lane;

  bool is_visible(int b, int i) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    return p.has_visible == 0 || operands.visible[operands.batch_offsets[p.B + b] + i] != 0;
  }

  // Row (b, i, k) as float32, rotated.
  void load_whole(int b, int i, int k) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const Int64 first = operands.batch_offsets[b] + i * p.x.token + k * p.x.head;
    for (int h = lane; h < p.H; h += 32) {
      columns.row[h] = load_float(operands.x, p.x_type, first + h);
    }
    if (p.is_rotated != 0) rotate_row(columns.row, p.H, lane);
  }

  // Without the center; zeros where the token can't be seen.
  void load(int b, int i, int k) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    if (!is_visible(b, i)) {
      for (int h = lane; h < p.H; h += 32) columns.row[h] = 0.0f;
      return;
    }
    load_whole(b, i, k);
    if (p.has_center == 0) return;
    for (int h = lane; h < p.H; h += 32) {
      const float x = columns.row[h];
      // A difference of two finite numbers is kept finite.
      const float centered =
          clamp(x - operands.center[(Int64(b) * p.K + k) * p.H + h], -FLT_MAX, FLT_MAX);
      columns.row[h] = isfinite(x) ? centered : x;
    }
  }

  // The squared norm of the row at hand, of whose columns each lane has its own.
  float norm() const thread {
    float sum = 0.0f;
    for (int h = lane; h < operands.parameters->H; h += 32) sum += columns.row[h] * columns.row[h];
    return simd_sum(sum);
  }
  // Divides the row at hand, of head k of entry b, by a power of 4 where it is large beside an
  // ordinary one, and returns the exponent. What is not finite is not divided.
  int divide(int b, int k) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    if (p.has_powers == 0) return 0;
    const float ordinary = operands.ordinary_norm[Int64(b) * p.K + k], found = norm();
    if (!(ordinary > 0.0f) || !isfinite(found)) return 0;
    int power = 0;
    for (float next = 16.0f * ordinary; power < kLargestPower && found >= next; next *= 16.0f) {
      ++power;
    }
    const float factor = 1.0f / float(1u << power * 2);
    for (int h = lane; h < p.H; h += 32) columns.row[h] *= factor;
    return power;
  }

  void clear_extremes() const thread {
    for (int h = lane; h < operands.parameters->H; h += 32) {
      columns.first[h] = INFINITY;
      columns.second[h] = -INFINITY;
    }
  }
  // Of row i of entry b, which is at hand, if it can be seen.
  void add_extremes(int b, int i) const thread {
    if (!is_visible(b, i)) return;
    for (int h = lane; h < operands.parameters->H; h += 32) {
      const float x = isfinite(columns.row[h]) ? columns.row[h] : NAN;
      columns.first[h] = lower(columns.first[h], x);
      columns.second[h] = higher(columns.second[h], x);
    }
  }

  // Of a block of tokens of a head among all that are stored.
  Int64 block_index(int b, int block, int k) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const int blocks = p.token_block == 0 ? 1 : (p.S + p.token_block - 1) / p.token_block;
    const int heads = p.is_per_tensor != 0 ? 1 : p.K;
    return (Int64(b) * blocks + block) * heads + (p.is_per_tensor != 0 ? 0 : k);
  }
  // Of the first scale of such a block.
  Int64 scale_index(Int64 block) const thread { return block * (scales() + power_cells()); }
  Int64 offset_index(Int64 block) const thread { return block * scales(); }
  int power_cells() const thread {
    constant QuantizeParameters& p = *operands.parameters;
    return p.has_powers != 0 ? (p.token_block + kPowersInCell - 1) / kPowersInCell : 0;
  }
  void store_power_cell(Int64 block, int cell, uint powers) const thread {
    if (lane != 0) return;
    reinterpret_cast<device ushort*>(operands.scale)[scale_index(block) + scales() + cell] =
        power_cell_of(powers);
  }
  // Scales of a row.
  int scales() const thread {
    constant QuantizeParameters& p = *operands.parameters;
    return p.head_block == 0 ? 1 : (p.H + p.head_block - 1) / p.head_block;
  }

  // From the extremes of the columns to what is stored for their blocks, which then takes their
  // place.
  void make_parameters(Int64 block) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    if (p.head_block == 0) {
      float min_x = INFINITY, max_x = -INFINITY;
      for (int h = lane; h < p.H; h += 32) {
        min_x = lower(min_x, columns.first[h]);
        max_x = higher(max_x, columns.second[h]);
      }
      const bool is_finite = !simd_any(isnan(min_x) || isnan(max_x));
      min_x = is_finite ? simd_min(min_x) : NAN;
      max_x = is_finite ? simd_max(max_x) : NAN;
      if (lane == 0) store_parameters(block, 0, min_x, max_x);
    } else {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (int c0 = 0; c0 < scales(); c0 += 32) {
        const int c = c0 + lane;
        float min_x = INFINITY, max_x = -INFINITY;
        for (int h = c * p.head_block; h < min(p.H, (c + 1) * p.head_block); ++h) {
          min_x = lower(min_x, columns.first[h]);
          max_x = higher(max_x, columns.second[h]);
        }
        // All have read their columns before the first of them is replaced.
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (c < scales()) store_parameters(block, c, min_x, max_x);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Scale c of a block and its offset, as they are stored.
  void store_parameters(Int64 block, int c, float min_x, float max_x) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const float highest = p.bits == 8 ? 127.0f : 7.0f;
    const float lowest = p.is_symmetric != 0 ? -highest : -highest - 1.0f;
    const float levels = highest - lowest;
    if (min_x > max_x) min_x = max_x = 0.0f;  // no tokens
    float scale, minimum = 0.0f;
    if (p.is_symmetric != 0) {
      scale = higher(-min_x, max_x) / highest;
    } else if (p.has_minimum != 0) {
      minimum = p.is_bfloat16 != 0 ? -round_up_to_bfloat16(-min_x) : min_x;
      scale = max_x / levels - minimum / levels;
    } else {
      min_x = lower(min_x, 0.0f);
      max_x = higher(max_x, 0.0f);
      scale = max_x / levels - min_x / levels;
    }
    if (p.is_bfloat16 != 0) {
      // Rounded down, the ends of a block lose at most 2^-9 of its steps: little of 15, half of one
      // of 255.
      scale = p.bits == 4 ? float_from_bfloat16(bfloat16_from_float(scale))
                          : round_up_to_bfloat16(scale);
    }
    if (scale < kMinScale) scale = 0.0f;
    const int type = p.is_bfloat16 != 0 ? kBF16 : kF32;
    store_float(operands.scale, type, scale_index(block) + c, scale);
    const Int64 index = offset_index(block) + c;
    float offset = minimum;
    if (p.has_minimum != 0) {
      store_float(operands.offset, type, index, minimum);
    } else if (p.is_symmetric == 0) {
      offset = scale > 0.0f ? clamp(rint(lowest - min_x / scale), lowest, highest) : 0.0f;
      reinterpret_cast<device char*>(operands.offset)[index] = char(offset);
    }
    columns.first[c] = scale;
    columns.second[c] = offset;
  }

  void load_parameters(Int64 block) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const int type = p.is_bfloat16 != 0 ? kBF16 : kF32;
    const Int64 index = offset_index(block);
    for (int c = lane; c < scales(); c += 32) {
      columns.first[c] = load_float(operands.scale, type, scale_index(block) + c);
      if (p.has_minimum != 0) {
        columns.second[c] = load_float(operands.offset, type, index + c);
      } else if (p.is_symmetric == 0) {
        columns.second[c] = float(reinterpret_cast<device const char*>(operands.offset)[index + c]);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  int code(int h) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const int c = p.head_block == 0 ? 0 : h / p.head_block;
    const float scale = columns.first[c], x = columns.row[h];
    const float highest = p.bits == 8 ? 127.0f : 7.0f;
    const float lowest = p.is_symmetric != 0 ? -highest : -highest - 1.0f;
    // Codes of a block without a usable scale are 0; what is not finite has none.
    const float divisor = scale > 0.0f ? scale : INFINITY;
    // Halves: the difference of two floats may be more than the largest.
    const float quotient =
        p.has_minimum != 0 ? (x * 0.5f - columns.second[c] * 0.5f) / (divisor * 0.5f) : x / divisor;
    float rounded = abs(quotient) < 1e30f ? rint(quotient) : 0.0f;
    if (p.has_minimum != 0) {
      rounded += lowest;
    } else if (p.is_symmetric == 0) {
      rounded += columns.second[c];
    }
    return int(clamp(rounded, lowest, highest));
  }

  void store_codes(int b, int i, int k) const thread {
    constant QuantizeParameters& p = *operands.parameters;
    const Int64 row = (Int64(b) * p.S + i) * p.K + k;
    if (p.bits == 8) {
      for (int h = lane; h < p.H; h += 32) {
        operands.data[row * p.H + h] = uchar(char(code(h)));
      }
    } else {
      for (int byte = lane; byte < p.H / 2; byte += 32) {
        operands.data[row * (p.H / 2) + byte] =
            uchar((code(2 * byte) + 8) | (code(2 * byte + 1) + 8) << 4);
      }
    }
  }
};
