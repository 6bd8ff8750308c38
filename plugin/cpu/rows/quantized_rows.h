// Rows of codes: as the float32 numbers that they stand for, and as INT8 rows with one scale each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/rows/rows.h"
#include "cpu/rows/token_powers.h"

namespace jax_gluon::cpu {
namespace {

// Codes unpacked at a time.
constexpr int64_t kCodeChunk = 256;

inline void unpack_nibbles(const uint8_t* packed, int64_t bytes, int8_t* codes) {
  for (int64_t i = 0; i < bytes; ++i) {
    codes[2 * i] = static_cast<int8_t>((packed[i] & 15) - 8);
    codes[2 * i + 1] = static_cast<int8_t>((packed[i] >> 4) - 8);
  }
}

// Where the scale of element (b, i, n, 0) stands, in elements.
inline int64_t scale_offset(const Operand& scale, const Quantization& q, int64_t b, int64_t i,
                            int64_t n) {
  // A division takes as long as many products of a row.
  const int64_t token = q.token_block == 1   ? token_offset(scale, b, i)
                        : q.token_block == 0 ? token_offset(scale, b, 0)
                                             : token_offset(scale, b, i, q.token_block);
  return token + n * scale.stride[1];
}

// Element = code * scale + offset.
struct ScaleAndOffset {
  float scale = 0.0f, offset = 0.0f;
};

// A row as INT8 codes with one scale.
struct ScaledCodes {
  const int8_t* codes;
  ScaleAndOffset scale;
};

inline float least_code(const Quantization& q) { return q.bits == 8 ? -128.0f : -8.0f; }

inline float code_offset(const Quantization& q, float scale, float stored) {
  switch (q.offset_kind) {
    case Quantization::Offset::kZeroPoint:
      return -stored * scale;
    case Quantization::Offset::kMinimum:
      return stored - least_code(q) * scale;
    default:
      return 0.0f;
  }
}

// Of element h of row (b, i, n); h counts scales, not columns.
inline ScaleAndOffset scale_at(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                               int64_t h = 0) {
  const Quantization& q = x.quantization;
  const auto read = [&](const Operand& from) {
    return float_at(from.data, from.dtype, scale_offset(from, q, b, i, n) + h * from.stride[2]);
  };
  const float scale = read(q.scale);
  return {scale, q.offset ? code_offset(q, scale, read(q.offset)) : 0.0f};
}

// The powers of the block of tokens that row (b, i, n) is in.
inline const uint16_t* power_cells_at(const Quantization& q, int64_t b, int64_t i, int64_t n,
                                      int64_t columns) {
  return static_cast<const uint16_t*>(q.scale.data) + scale_offset(q.scale, q, b, i, n) + columns;
}

// What row (b, i, n) of codes is multiplied by beside its scales; `columns` is the scales of a row.
inline float power_of_row(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                          int64_t columns) {
  const Quantization& q = x.quantization;
  if (!q.has_powers) return 1.0f;
  return token_factor(power_cells_at(q, b, i, n, columns), i % q.token_block);
}

// Whether that may be other than 1 in the block of tokens that row (b, i, n) is in.
inline bool has_large_tokens(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                             int64_t columns) {
  const Quantization& q = x.quantization;
  if (!q.has_powers) return false;
  const uint16_t* cells = power_cells_at(q, b, i, n, columns);
  uint32_t powers = 0;
  for (int64_t c = 0; c < power_cells(q.token_block); ++c) powers |= powers_of_cell(cells[c]);
  return powers != 0;
}

// Whether scales of a row, or what is added to them, lie side by side as bfloat16.
inline bool has_bf16_rows(const Operand& x) { return x.dtype == DType::kBF16 && x.stride[2] == 1; }

// The center of head n that centering took from its rows, or null.
inline const float* stored_center(const QuantizableOperand& x, int64_t b, int64_t n) {
  const Operand& center = x.quantization.center;
  if (!center) return nullptr;
  return static_cast<const float*>(center.data) + center.batch_offset[static_cast<size_t>(b)] +
         n * center.stride[1];
}

template <class Isa>
class QuantizedRow {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;

 public:
  // Row (b, i, n) of floats, or of the centered floats that codes stand for.
  static void load(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n, int64_t width,
                   float* out) {
    const void* row = row_of(x, b, i, n);
    const Quantization& q = x.quantization;
    if (!q) {
      load_row<Isa>(row, x.dtype, width, out);
      return;
    }
    alignas(kAlignment) int8_t unpacked[kCodeChunk];
    for (int64_t h = 0; h < width; h += kCodeChunk) {
      const int64_t count = std::min(kCodeChunk, width - h);
      const int8_t* codes = static_cast<const int8_t*>(row) + h;
      if (q.bits == 4) {
        unpack_nibbles(static_cast<const uint8_t*>(row) + h / 2, count / 2, unpacked);
        codes = unpacked;
      }
      load_row<Isa>(codes, DType::kS8, count, out + h);
    }
    if (q.head_block == 0) {
      multiply_add(out, width, scale_at(x, b, i, n));
    } else if (q.head_block == 1) {
      multiply_add_each(x, b, i, n, width, out);
      const float power = power_of_row(x, b, i, n, width);
      if (power != 1.0f) scale_row<Isa>(out, width, power);
    } else {
      for (int64_t h = 0; h < width; h += q.head_block) {
        multiply_add(out + h, std::min(q.head_block, width - h),
                     scale_at(x, b, i, n, h / q.head_block));
      }
    }
  }

  // As load, but with the center added.
  static void load_uncentered(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                              int64_t width, float* out) {
    load(x, b, i, n, width, out);
    if (const float* center = stored_center(x, b, n)) {
      for (int64_t h = 0; h < width; ++h) out[h] += center[h];
    }
  }

  // Row (b, i, n) of codes as INT8 codes with one scale. Where the stored scales vary along the row
  // its numbers are rounded again (INT4 only: it costs little beside the 4 bits). `row` and `codes`
  // are scratch of `width`, rounded up to the lanes; the result may point into them.
  static ScaledCodes codes_of(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                              int64_t width, float* row, int8_t* codes) {
    const Quantization& q = x.quantization;
    if (q.head_block != 0) {
      load(x, b, i, n, width, row);
      return {codes, {round_to_codes(row, width, codes), 0.0f}};
    }
    const void* stored = row_of(x, b, i, n);
    if (q.bits == 8) return {static_cast<const int8_t*>(stored), scale_at(x, b, i, n)};
    unpack_nibbles(static_cast<const uint8_t*>(stored), width / 2, codes);
    return {codes, scale_at(x, b, i, n)};
  }

  // The first `count` scales of row (b, i, n), and offsets where there are any.
  static void load_scales(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                          int64_t count, float* scales, float* offsets) {
    const Quantization& q = x.quantization;
    read_scales(q.scale, scale_offset(q.scale, q, b, i, n), count, scales);
    if (!q.offset) return;
    read_scales(q.offset, scale_offset(q.offset, q, b, i, n), count, offsets);
    for (int64_t g = 0; g < count; ++g) offsets[g] = code_offset(q, scales[g], offsets[g]);
  }

  // The largest magnitude, NaN where an element is not finite. `row` is zero-padded to the lanes.
  static float largest_magnitude(const float* row, int64_t width) {
    F largest = Isa::zero(), probe = Isa::zero();
    for (int64_t h = 0; h < width; h += W) {
      const F v = Isa::load(row + h);
      largest = Isa::max(largest, Isa::abs(v));
      probe = Isa::fma(v, Isa::zero(), probe);  // NaN once v is not finite
    }
    const bool finite = Isa::reduce_add(probe) == 0.0f;
    return finite ? Isa::reduce_max(largest) : std::numeric_limits<float>::quiet_NaN();
  }

  // Symmetric INT8 codes of a row with room for whole vectors; returns the scale.
  static float round_to_codes(float* row, int64_t width, int8_t* codes) {
    const int64_t padded = round_up(width, W);
    std::fill(row + width, row + padded, 0.0f);
    const float scale = largest_magnitude(row, padded) / 127.0f;
    if (!(scale >= std::numeric_limits<float>::min())) {
      std::memset(codes, 0, static_cast<size_t>(padded));
      return scale != scale ? scale : 0.0f;
    }
    const F divisor = Isa::set1(scale);
    for (int64_t h = 0; h < padded; h += W) {
      Isa::store_s8(codes + h, Isa::to_int(Isa::div(Isa::load(row + h), divisor)));
    }
    return scale;
  }

 private:
  static void read_scales(const Operand& from, int64_t index, int64_t count, float* to) {
    if (from.dtype == DType::kF32 && count == 1) {
      *to = static_cast<const float*>(from.data)[index];
    } else if (count == 1 || from.stride[2] == 0) {
      std::fill(to, to + count, float_at(from.data, from.dtype, index));
    } else {
      const char* p = static_cast<const char*>(from.data);
      load_row<Isa>(p + index * static_cast<int64_t>(size_of(from.dtype)), from.dtype, count, to);
    }
  }

  static void multiply_add(float* x, int64_t n, ScaleAndOffset s) {
    const F scale = Isa::set1(s.scale), offset = Isa::set1(s.offset);
    int64_t h = 0;
    for (; h + W <= n; h += W) {
      Isa::store(x + h, Isa::add(Isa::mul(Isa::load(x + h), scale), offset));
    }
    for (; h < n; ++h) x[h] = x[h] * s.scale + s.offset;
  }

  // A scale, and perhaps an offset, for each element.
  static void multiply_add_each(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n,
                                int64_t width, float* out) {
    const Quantization& q = x.quantization;
    alignas(kAlignment) float scale[kCodeChunk], stored[kCodeChunk];
    const auto read = [&](const Operand& from, int64_t h, int64_t count, float* to) {
      const int64_t at = scale_offset(from, q, b, i, n) + h;
      const char* p = static_cast<const char*>(from.data);
      load_row<Isa>(p + at * static_cast<int64_t>(size_of(from.dtype)), from.dtype, count, to);
    };
    for (int64_t h = 0; h < width; h += kCodeChunk) {
      const int64_t count = std::min(kCodeChunk, width - h);
      read(q.scale, h, count, scale);
      if (q.offset) read(q.offset, h, count, stored);
      for (int64_t c = 0; c < count; ++c) {
        const float offset = q.offset ? code_offset(q, scale[c], stored[c]) : 0.0f;
        out[h + c] = out[h + c] * scale[c] + offset;
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
