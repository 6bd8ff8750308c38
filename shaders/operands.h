// The arguments of the attention kernels, and the heads that they point at.
#pragma once

#include "operand.h"

// clang-format off
#define JAX_GLUON_OPERANDS                                                                         \
  constant AttentionParameters& parameters [[buffer(kParameters)]],                                \
  device const Int64* batch_offsets [[buffer(kBatchOffsets)]],                                     \
  device const uchar* query [[buffer(kQuery)]],                                                    \
  device const uchar* key [[buffer(kKey)]],                                                        \
  device const uchar* value [[buffer(kValue)]],                                                    \
  device const uchar* query_scale [[buffer(kQueryScale)]],                                         \
  device const uchar* query_offset [[buffer(kQueryOffset)]],                                       \
  device const float* query_center [[buffer(kQueryCenter)]],                                           \
  device const uchar* key_scale [[buffer(kKeyScale)]],                                             \
  device const uchar* key_offset [[buffer(kKeyOffset)]],                                           \
  device const float* key_center [[buffer(kKeyCenter)]],                                               \
  device const uchar* value_scale [[buffer(kValueScale)]],                                         \
  device const uchar* value_offset [[buffer(kValueOffset)]],                                       \
  device const float* value_center [[buffer(kValueCenter)]],                                           \
  device const uchar* bias [[buffer(kBias)]],                                                      \
  device const uchar* mask [[buffer(kMask)]],                                                      \
  device const BatchEntry* entries [[buffer(kEntries)]],                                           \
  device const int* visible_keys [[buffer(kVisibleKeys)]]

#define JAX_GLUON_MAKE_OPERANDS                                                                    \
  Operands{&p, batch_offsets, query, key, value, query_scale, query_offset, query_center,   \
           key_scale, key_offset, key_center, value_scale, value_offset, value_center, bias, mask,     \
           entries, visible_keys}

#define JAX_GLUON_THREAD                                                                           \
  uint3 group_of_part [[threadgroup_position_in_grid]],                                            \
  ushort simdgroup [[simdgroup_index_in_threadgroup]],                                             \
  ushort lane [[thread_index_in_simdgroup]],                                                       \
  ushort thread_index [[thread_index_in_threadgroup]]
// Of the whole grid, which the host may cut into several dispatches.
#define JAX_GLUON_GROUP                                                                            \
  (group_of_part + uint3(p.first_group.x, p.first_group.y, p.first_group.z))
// clang-format on

// Where the row of a token and a head lies among those of a result, or of a cotangent.
inline Int64 row_index(thread const AttentionParameters& p, int b, int token, int tokens, int head,
                       int heads) {
  const Int64 at =
      p.is_head_major != 0 ? Int64(head) * tokens + token : Int64(token) * heads + head;
  return Int64(b) * tokens * heads + at;
}

struct Operands {
  thread const AttentionParameters* parameters;
  device const Int64* batch_offsets;
  device const uchar* query;
  device const uchar* key;
  device const uchar* value;
  device const uchar* query_scale;
  device const uchar* query_offset;
  device const float* query_center;
  device const uchar* key_scale;
  device const uchar* key_offset;
  device const float* key_center;
  device const uchar* value_scale;
  device const uchar* value_offset;
  device const float* value_center;
  device const uchar* bias;
  device const uchar* mask;
  device const BatchEntry* entries;
  device const int* visible_keys;

  Int64 batch_offset(int table, int b) const thread {
    return batch_offsets[Int64(table) * parameters->B + b];
  }

  // Of query head n, where there are sinks.
  float sink(int b, int n) const thread {
    device const float* sinks =
        (device const float*)(batch_offsets + Int64(kBatchTables) * parameters->B);
    return sinks[Int64(b) * parameters->N + n];
  }

  float sink_tangent(int b, int n) const thread { return sink(parameters->B + b, n); }

  // Of the three, the query alone comes with its center; and values, where what is dropped keeps
  // theirs from being the same for all rows.
  Rows query_rows(int b, int n) const thread {
    thread const AttentionParameters& p = *parameters;
    Rows rows = head(query, query_scale, query_offset, query_center, p.query_quantization,
                     query_type, p.H, p.query, b, n, kQueryBatch, kQueryScaleBatch);
    rows.adds_center = true;
    return rows;
  }
  Rows key_rows(int b, int k) const thread {
    thread const AttentionParameters& p = *parameters;
    return head(key, key_scale, key_offset, key_center, p.key_quantization, key_type, p.H, p.key, b,
                k, kKeyBatch, kKeyScaleBatch);
  }
  Rows value_rows(int b, int k) const thread {
    thread const AttentionParameters& p = *parameters;
    Rows rows = head(value, value_scale, value_offset, value_center, p.value_quantization,
                     value_type, p.V, p.value, b, k, kValueBatch, kValueScaleBatch);
    rows.adds_center = p.dropout_threshold != 0;
    return rows;
  }

 private:
  // The tables of scale, offset and center follow one another.
  Rows head(device const uchar* data, device const uchar* scale, device const uchar* offset,
            device const float* center, thread const QuantizationParameters& quantization, int type,
            int columns, RowStrides strides, int b, int n, int table,
            int scale_table) const thread {
    Rows rows;
    const Int64 first = batch_offset(table, b) + n * strides.head;
    rows.data = data + first * (type == kF32 ? 4 : is_code(type) ? 1 : 2);
    rows.quantization = quantization;
    rows.type = type;
    rows.columns = columns;
    rows.stride = strides.token;
    rows.adds_center = false;
    if (is_code(type)) {
      const int size = quantization.is_bfloat16 != 0 ? 2 : 4;
      rows.scale = scale + (batch_offset(scale_table, b) + n * quantization.scale.head) * size;
      rows.offset = offset + (batch_offset(scale_table + 1, b) + n * quantization.offset.head) *
                                 (quantization.offset_kind == kZeroPoint ? 1 : size);
      rows.center = center + batch_offset(scale_table + 2, b) + n * quantization.center_head_stride;
    } else {
      rows.scale = scale;
      rows.offset = offset;
      rows.center = center;
    }
    return rows;
  }
};
