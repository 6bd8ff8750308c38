// The tiles of keys and values that the threadgroups of all kernels but the dK/dV pass walk.
#pragma once

#include "tile.h"

// clang-format off
#define JAX_GLUON_KEY_VALUE_TILES(M, D)                                                            \
  threadgroup M key_tile[BlockSizes<M, D>::kTileElements];                                         \
  threadgroup M value_tile[BlockSizes<M, D>::kTileElements];                                       \
  threadgroup float key_scales[BlockSizes<M, D>::kTileRows];                                       \
  threadgroup float value_scales[BlockSizes<M, D>::kTileRows];                                     \
  threadgroup float key_columns[BlockSizes<M, D>::kColumnParameters];                              \
  threadgroup float value_columns[BlockSizes<M, D>::kColumnParameters];                            \
  threadgroup bool is_dirty[kThreads];                                                             \
  const KeyValueTiles<M, D> tiles{key_tile,    value_tile,    key_scales, value_scales,            \
                                  key_columns, value_columns, is_dirty}
// clang-format on

template <typename M, int D>
struct KeyValueTiles {
  threadgroup M* keys;
  threadgroup M* values;
  // Of rows of exact codes.
  threadgroup float* key_scales;
  threadgroup float* value_scales;
  // Scales and offsets of columns, of the tokens at hand and of those that follow them.
  threadgroup float* key_columns;
  threadgroup float* value_columns;
  threadgroup bool* is_dirty;

  static constant constexpr int kRows = BlockSizes<M, D>::kTileRows;

  // The first token of the tile that a walk over `range` starts with, for all of which columns are
  // staged: tiles that are staged are aligned, so that each lies in one block of tokens.
  int start(thread const Rows& key_rows, thread const Rows& value_rows, Range range,
            ushort thread_index) const thread {
    const bool stages_keys = stages_columns<M, D>(key_rows);
    const bool stages_values = stages_columns<M, D>(value_rows);
    const int alignment = stages_keys || stages_values ? kRows : 8;
    const int first = range.begin / alignment * alignment;
    if (range.is_empty()) return first;
    if (stages_keys) stage(key_rows, first, key_columns, thread_index);
    if (stages_values) stage(value_rows, first, value_columns, thread_index);
    return first;
  }

  // Loads tokens `first` and the following, up to `end`; every thread takes part. Two barriers: all
  // have used the tiles before, and see them afterwards. Of the operand that is summed, what is not
  // finite is left out; returns whether there is any.
  template <bool kSumsKeys, bool kSumsValues>
  bool load(thread const Rows& key_rows, thread const Rows& value_rows, int first, int end,
            ushort thread_index) const thread {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool keys_dirty =
        load_tile<M, D, kSumsKeys>(key_rows, first, end, keys, key_scales,
                                   stages_columns<M, D>(key_rows), key_columns, thread_index);
    const bool values_dirty =
        load_tile<M, D, kSumsValues>(value_rows, first, end, values, value_scales,
                                     stages_columns<M, D>(value_rows), value_columns, thread_index);
    is_dirty[thread_index] = keys_dirty || values_dirty;
    stage_next(key_rows, first, end, key_columns, thread_index);
    stage_next(value_rows, first, end, value_columns, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return any_dirty(is_dirty, thread_index & 31);
  }

 private:
  void stage(thread const Rows& rows, int token, threadgroup float* columns,
             ushort thread_index) const thread {
    stage_columns<D>(rows, token, columns_of_block<D>(columns, rows.token_block(token)),
                     thread_index);
  }
  void stage_next(thread const Rows& rows, int first, int end, threadgroup float* columns,
                  ushort thread_index) const thread {
    const int next = first + kRows;
    if (!stages_columns<M, D>(rows) || next >= end) return;
    if (rows.token_block(next) != rows.token_block(first)) {
      stage(rows, next, columns, thread_index);
    }
  }
};
