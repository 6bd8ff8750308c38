// The gluon pipeline's way to threadgroup memory: a ring of granules of rows, filled ahead. While
// the simdgroups multiply what is there, each thread has its part of a later granule on its way
// from device memory in registers; it is dequantized when it is written, after the products.
#pragma once

#include "tile.h"

// Granules 0, 1, ... of one operand. Granule i has slot i % kSlots; while granule i is in use,
// granule i + kAhead is filled. A slot is written kSlots - kAhead barriers or more after its last
// use: with one slot, `KeyValueRing` and its like have a barrier before they write. `kHasColumns`:
// there is room for scales and offsets of columns.
template <typename M, int D, int kSlots, bool kIsSummed, bool kHasColumns>
struct Ring {
  static constant constexpr int kRows = RingSizes<M, D>::kGranuleRows;
  static constant constexpr int kStride = BlockSizes<M, D>::kStride;
  static constant constexpr int kAhead = kSlots == 1 ? 1 : kSlots - 1;
  static constant constexpr int kParts = kRows / TilePart<D>::kStep;
  static_assert(kParts * TilePart<D>::kStep == kRows, "all threads take part in each step");

  struct Memory {
    M rows[kSlots * kRows * kStride];
    float scales[kSlots * kRows];
    // Scales and offsets of columns, of the blocks of tokens that granules at hand are in.
    float columns[kHasColumns && sizeof(M) == 4 ? (kAhead + 1) * StagedColumns<D>::kFloats : 1];
    bool is_dirty[kIsSummed ? kSlots * kThreads : 1];
  };

  threadgroup Memory* memory;
  HeldPart held[kParts];

  // Brings the columns of granule i, at tokens `first` and the following, unless they are those of
  // the granule before it. They are in use from the next barrier on, until granule i is filled.
  void stage(thread const Rows& rows, int i, int first, ushort thread_index) const thread {
    if (i > 0 && rows.token_block(first - kRows) == rows.token_block(first)) return;
    stage_columns<D>(rows, first, columns(rows, first), thread_index);
  }

  // Begins to fill a granule: tokens `first` and the following, up to `end`.
  void read(thread const Rows& rows, int first, int end, TilePart<D> part) thread {
    for (int s = 0; s < kParts; ++s) {
      const int token = first + part.row + s * TilePart<D>::kStep;
      held[s] = read_part<M, D>(rows, token, token < end, part);
    }
  }

  // Ends it, with the same part: granule i is in use from the next barrier on.
  void write(thread const Rows& rows, int i, int first, int end, bool is_staged, TilePart<D> part,
             ushort thread_index) const thread {
    const int slot = i % kSlots;
    threadgroup const float* staged = is_staged ? columns(rows, first) : memory->columns;
    bool is_dirty = false;
    for (int s = 0; s < kParts; ++s) {
      const int r = part.row + s * TilePart<D>::kStep;
      const bool is_inside = first + r < end;
      is_dirty |= write_part<M, D, kIsSummed>(held[s], rows, first + r, is_inside, part,
                                              memory->rows + (slot * kRows + r) * kStride,
                                              memory->scales + slot * kRows + r, is_staged, staged);
    }
    if (kIsSummed) memory->is_dirty[slot * kThreads + thread_index] = is_dirty;
  }

  // Row `row` of granule i, and of its scales.
  threadgroup const M* rows_of(int i, int row) const thread {
    return memory->rows + (i % kSlots * kRows + row) * kStride;
  }
  threadgroup const float* scales_of(int i, int row) const thread {
    return memory->scales + i % kSlots * kRows + row;
  }
  // Whether granule i has zeros for what is not finite.
  bool is_dirty(int i, ushort lane) const thread {
    return any_dirty(memory->is_dirty + i % kSlots * kThreads, lane);
  }

 private:
  threadgroup float* columns(thread const Rows& rows, int token) const thread {
    return memory->columns + rows.token_block(token) % (kAhead + 1) * StagedColumns<D>::kFloats;
  }
};

// The granules of keys and values of a walk.
template <typename M, int D, int kKeySlots, bool kSumsKeys, bool kSumsValues>
struct KeyValueRing {
  using Sizes = RingSizes<M, D>;
  using Keys = Ring<M, D, kKeySlots, kSumsKeys, true>;
  using Values = Ring<M, D, Sizes::kSlots, kSumsValues, true>;
  static constant constexpr int kRows = Sizes::kGranuleRows;

  struct Memory {
    typename Keys::Memory keys;
    typename Values::Memory values;
  };
  static_assert(sizeof(Memory) <= 32768, "threadgroup memory");

  Keys keys;
  Values values;
  int first;  // token of granule 0
  int end;
  int count;  // of granules
  bool stages_keys;
  bool stages_values;

  // Fills the first granules of a walk over `range`; every thread takes part. Granules whose
  // columns are staged are aligned, so that each lies in one block of tokens.
  void start(threadgroup Memory* memory, thread const Rows& key_rows, thread const Rows& value_rows,
             Range range, ushort thread_index) thread {
    keys.memory = &memory->keys;
    values.memory = &memory->values;
    stages_keys = stages_columns<M, D>(key_rows);
    stages_values = stages_columns<M, D>(value_rows);
    const int alignment = stages_keys || stages_values ? kRows : 8;
    first = range.begin / alignment * alignment;
    end = range.end;
    count = range.is_empty() ? 0 : (end - first + kRows - 1) / kRows;
    if (count == 0) return;
    if (stages_keys || stages_values) {
      for (int i = 0; i <= Keys::kAhead; ++i) stage(keys, key_rows, stages_keys, i, thread_index);
      for (int i = 0; i <= Values::kAhead; ++i) {
        stage(values, value_rows, stages_values, i, thread_index);
      }
      // A simdgroup's parts take the columns that it has staged itself: without powers, the
      // threadgroup needs no barrier.
      if (key_rows.has_powers() || value_rows.has_powers()) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // columns and powers are staged
      } else {
        simdgroup_barrier(mem_flags::mem_threadgroup);  // columns are staged
      }
    }
    const TilePart<D> key_part(thread_index, stages_keys);
    for (int i = 0; i < Keys::kAhead && i < count; ++i) {
      keys.read(key_rows, token(i), end, key_part);
      keys.write(key_rows, i, token(i), end, stages_keys, key_part, thread_index);
    }
    const TilePart<D> value_part(thread_index, stages_values);
    values.read(value_rows, first, end, value_part);
    values.write(value_rows, 0, first, end, stages_values, value_part, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the first granules are filled
  }

  // Begins what `advance` ends.
  void prefetch(thread const Rows& key_rows, thread const Rows& value_rows, int i,
                ushort thread_index) thread {
    const TilePart<D> part(thread_index);
    if (i + Keys::kAhead < count) keys.read(key_rows, token(i + Keys::kAhead), end, part);
    if (i + 1 < count) values.read(value_rows, token(i + 1), end, part);
  }

  // The simdgroup has used granule i; every thread takes part.
  void advance(thread const Rows& key_rows, thread const Rows& value_rows, int i,
               ushort thread_index) const thread {
    static_assert(Values::kAhead == 1, "values are one granule ahead");
    if (i + 1 >= count) return;
    if (Sizes::kSlots == 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the only slot is free
    }
    const TilePart<D> part(thread_index);
    const int key = i + Keys::kAhead;
    if (key < count) keys.write(key_rows, key, token(key), end, stages_keys, part, thread_index);
    values.write(value_rows, i + 1, token(i + 1), end, stages_values, part, thread_index);
    stage(keys, key_rows, stages_keys, key + 1, thread_index);
    stage(values, value_rows, stages_values, i + 2, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next granule is filled
  }

  int token(int i) const thread { return first + i * kRows; }

 private:
  template <typename AnyRing>
  void stage(thread const AnyRing& ring, thread const Rows& rows, bool is_staged, int i,
             ushort thread_index) const thread {
    if (is_staged && i < count) ring.stage(rows, i, token(i), thread_index);
  }
};
