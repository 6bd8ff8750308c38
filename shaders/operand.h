// Rows of operands, read as they are stored.
#pragma once

#include "bindings.h"

constant int query_type [[function_constant(kQueryType)]];
constant int key_type [[function_constant(kKeyType)]];
constant int value_type [[function_constant(kValueType)]];

constexpr bool is_code(int type) { return type >= kS8; }

// bfloat16 is decoded from its bits: not every GPU family has the type.
inline float float_from_bfloat16(ushort bits) { return as_type<float>(uint(bits) << 16); }

// Rounded to nearest even; NaN stays NaN.
inline ushort bfloat16_from_float(float x) {
  const uint bits = as_type<uint>(x);
  if (isnan(x)) return ushort(bits >> 16 | 0x40);
  return ushort((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load_float(device const uchar* data, int type, Int64 index) {
  switch (type) {
    case kF32:
      return reinterpret_cast<device const float*>(data)[index];
    case kBF16:
      return float_from_bfloat16(reinterpret_cast<device const ushort*>(data)[index]);
    default:
      return float(reinterpret_cast<device const half*>(data)[index]);
  }
}

inline void store_float(device uchar* data, int type, Int64 index, float x) {
  switch (type) {
    case kF32:
      reinterpret_cast<device float*>(data)[index] = x;
      break;
    case kBF16:
      reinterpret_cast<device ushort*>(data)[index] = bfloat16_from_float(x);
      break;
    default:
      reinterpret_cast<device half*>(data)[index] = half(x);
  }
}

// An element, or a code as a number.
inline float load_element(device const uchar* data, int type, Int64 row, int column) {
  switch (type) {
    case kS8:
      return float(reinterpret_cast<device const char*>(data)[row + column]);
    case kU4x2:
      return float((data[row + column / 2] >> (column % 2 * 4) & 15) - 8);
    default:
      return load_float(data, type, row + column);
  }
}

// Eight of them, from a column that is a multiple of 8, zeros past `columns`. Each stored byte is
// read once.
inline void load_eight(device const uchar* data, int type, Int64 row, int column, int columns,
                       thread float* x) {
  if (column + 8 <= columns) {
    switch (type) {
      case kF32:
        for (int i = 0; i < 8; i += 4) {
          const float4 four = reinterpret_cast<device const packed_float4*>(
              reinterpret_cast<device const float*>(data) + row + column + i)[0];
          for (int c = 0; c < 4; ++c) x[i + c] = four[c];
        }
        return;
      case kBF16:
        for (int i = 0; i < 8; i += 4) {
          const ushort4 four = reinterpret_cast<device const packed_ushort4*>(
              reinterpret_cast<device const ushort*>(data) + row + column + i)[0];
          for (int c = 0; c < 4; ++c) x[i + c] = float_from_bfloat16(four[c]);
        }
        return;
      case kF16:
        for (int i = 0; i < 8; i += 4) {
          const half4 four = reinterpret_cast<device const packed_half4*>(
              reinterpret_cast<device const half*>(data) + row + column + i)[0];
          for (int c = 0; c < 4; ++c) x[i + c] = float(four[c]);
        }
        return;
      case kS8:
        for (int i = 0; i < 8; i += 4) {
          const char4 four =
              reinterpret_cast<device const packed_char4*>(data + row + column + i)[0];
          for (int c = 0; c < 4; ++c) x[i + c] = float(four[c]);
        }
        return;
      default: {
        const uchar4 four =
            reinterpret_cast<device const packed_uchar4*>(data + row + column / 2)[0];
        for (int c = 0; c < 4; ++c) {
          x[2 * c] = float(int(four[c] & 15) - 8);
          x[2 * c + 1] = float(int(four[c] >> 4) - 8);
        }
        return;
      }
    }
  }
  for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  if (type == kU4x2) {
    for (int i = 0; column + i < columns; i += 2) {
      const int byte = data[row + (column + i) / 2];
      x[i] = float((byte & 15) - 8);
      x[i + 1] = float((byte >> 4) - 8);
    }
  } else {
    for (int i = 0; column + i < columns; ++i) x[i] = load_element(data, type, row, column + i);
  }
}

// The rows of one head of an operand.
struct Rows {
  device const uchar* data;
  device const uchar* scale;
  device const uchar* offset;
  device const float* mean;  // of this head
  QuantizationParameters quantization;
  int type;
  int columns;
  Int64 stride;    // from token to token
  bool adds_mean;  // to the elements, where centring took one from them

  int token_block(int token) const thread {
    const int size = quantization.token_block;
    return size == 1 ? token : size == 0 ? 0 : token / size;
  }
  float scale_at(int token, int column_block) const thread {
    thread const BlockStrides& at = quantization.scale;
    const Int64 index = token_block(token) * at.block + column_block * at.column;
    return load_float(scale, quantization.is_bfloat16 != 0 ? kBF16 : kF32, index);
  }
  float zero_point_at(int token, int column_block) const thread {
    thread const BlockStrides& at = quantization.offset;
    const Int64 index = token_block(token) * at.block + column_block * at.column;
    return float(reinterpret_cast<device const char*>(offset)[index]);
  }
  // What is added to a code where there is no minimum.
  float code_offset_at(int token, int column_block) const thread {
    return quantization.offset_kind == kZeroPoint ? -zero_point_at(token, column_block) : 0.0f;
  }
  // What is added to code * scale.
  float offset_at(int token, int column_block, float scale) const thread {
    if (quantization.offset_kind == kZeroPoint) return -zero_point_at(token, column_block) * scale;
    if (quantization.offset_kind == kNoOffset) return 0.0f;
    thread const BlockStrides& at = quantization.offset;
    const Int64 index = token_block(token) * at.block + column_block * at.column;
    const float least_code = type == kS8 ? -128.0f : -8.0f;
    const float minimum = load_float(offset, quantization.is_bfloat16 != 0 ? kBF16 : kF32, index);
    return minimum - least_code * scale;
  }
  int column_block(int column) const thread {
    const int size = quantization.head_block;
    return size == 0 ? 0 : size == 1 ? column : column / size;
  }

  // What an element stands for.
  float value(int token, int column) const thread {
    if (column >= columns) return 0.0f;
    const float x = load_element(data, type, token * stride, column);
    if (!is_code(type)) return x;
    const float s = scale_at(token, column_block(column));
    const float centred = x * s + offset_at(token, column_block(column), s);
    return adds_mean ? centred + mean_at(column) : centred;
  }
  bool has_mean() const thread { return is_code(type) && quantization.has_mean != 0; }
  float mean_at(int column) const thread {
    return has_mean() && column < columns ? mean[column] : 0.0f;
  }
};
