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

// 4^power of a token of a block, from the number that keeps it: see plugin/attention_call.h.
inline float token_factor(uint cell, int token) {
  const uint powers = (cell & 0x3fff) | (cell >> 1 & 0x4000);
  return float(1u << (powers >> 3 * (token % kPowersInCell) & 7) * 2);
}
inline ushort power_cell_of(uint powers) {
  return ushort((powers & 0x3fff) | (powers & 0x4000) << 1 | (~powers & 0x2000) << 1);
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

// Eight elements as they are stored, in as many words as they fill, first ones first.
struct StoredEight {
  uint words[8];
};

// Eight of them, from a column that is a multiple of 8; past `columns` what stands for 0. Each
// stored byte is read once.
inline StoredEight read_eight(device const uchar* data, int type, Int64 row, int column,
                              int columns) {
  StoredEight x;
  if (column + 8 <= columns) {
    switch (type) {
      case kF32:
        for (int i = 0; i < 8; i += 4) {
          const uint4 four = as_type<uint4>(float4(reinterpret_cast<device const packed_float4*>(
              reinterpret_cast<device const float*>(data) + row + column + i)[0]));
          for (int c = 0; c < 4; ++c) x.words[i + c] = four[c];
        }
        return x;
      case kBF16:
      case kF16:
        for (int i = 0; i < 8; i += 4) {
          const uint2 four = as_type<uint2>(ushort4(reinterpret_cast<device const packed_ushort4*>(
              reinterpret_cast<device const ushort*>(data) + row + column + i)[0]));
          for (int c = 0; c < 2; ++c) x.words[i / 2 + c] = four[c];
        }
        return x;
      case kS8:
        for (int i = 0; i < 8; i += 4) {
          x.words[i / 4] = as_type<uint>(
              uchar4(reinterpret_cast<device const packed_uchar4*>(data + row + column + i)[0]));
        }
        return x;
      default:
        x.words[0] = as_type<uint>(
            uchar4(reinterpret_cast<device const packed_uchar4*>(data + row + column / 2)[0]));
        return x;
    }
  }
  for (int i = 0; i < 8; ++i) x.words[i] = type == kU4x2 ? 0x88888888u : 0u;
  for (int i = 0; i < 8 && column + i < columns; ++i) {
    const Int64 at = row + column + i;
    switch (type) {
      case kF32:
        x.words[i] = reinterpret_cast<device const uint*>(data)[at];
        break;
      case kBF16:
      case kF16:
        x.words[i / 2] |= uint(reinterpret_cast<device const ushort*>(data)[at]) << (i % 2 * 16);
        break;
      case kS8:
        x.words[i / 4] |= uint(data[at]) << (i % 4 * 8);
        break;
      default:
        // Of the first of two codes.
        if (i % 2 == 0) {
          x.words[0] ^= uint(data[row + (column + i) / 2] ^ 0x88) << (i * 4);
        }
    }
  }
  return x;
}

// As numbers.
inline void decode_eight(StoredEight x, int type, thread float* decoded) {
  for (int i = 0; i < 8; ++i) {
    const ushort half_word = ushort(x.words[i / 2] >> (i % 2 * 16));
    switch (type) {
      case kF32:
        decoded[i] = as_type<float>(x.words[i]);
        break;
      case kBF16:
        decoded[i] = float_from_bfloat16(half_word);
        break;
      case kF16:
        decoded[i] = float(as_type<half>(half_word));
        break;
      case kS8:
        decoded[i] = float(int(x.words[i / 4] << (24 - i % 4 * 8)) >> 24);
        break;
      default:
        decoded[i] = float(int(x.words[0] >> (i * 4) & 15) - 8);
    }
  }
}

// The rows of one head of an operand.
struct Rows {
  device const uchar* data;
  device const uchar* scale;
  device const uchar* offset;
  device const float* center;  // of this head
  QuantizationParameters quantization;
  int type;
  int columns;
  Int64 stride;      // from token to token
  bool adds_center;  // to the elements, where centering took one from them

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
    const float min_code = type == kS8 ? -128.0f : -8.0f;
    const float minimum = load_float(offset, quantization.is_bfloat16 != 0 ? kBF16 : kF32, index);
    return minimum - min_code * scale;
  }
  bool has_powers() const thread { return is_code(type) && quantization.has_powers != 0; }
  int power_cells() const thread {
    return (quantization.token_block + kPowersInCell - 1) / kPowersInCell;
  }
  // Number `cell` of the powers of the block of tokens that `token` is in.
  uint power_cell(int token, int cell) const thread {
    const Int64 index = token_block(token) * quantization.scale.block + columns + cell;
    return reinterpret_cast<device const ushort*>(scale)[index];
  }
  // What (code * scale + offset) is multiplied by.
  float power_at(int token) const thread {
    if (quantization.has_powers == 0) return 1.0f;
    const int in_block = token % quantization.token_block;
    return token_factor(power_cell(token, in_block / kPowersInCell), in_block);
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
    const float centered = (x * s + offset_at(token, column_block(column), s)) * power_at(token);
    return adds_center ? centered + center_at(column) : centered;
  }
  bool has_center() const thread { return is_code(type) && quantization.has_center != 0; }
  float center_at(int column) const thread {
    return has_center() && column < columns ? center[column] : 0.0f;
  }
};
