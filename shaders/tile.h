// 8x8 matrices spread over a simdgroup, and the tiles of rows in threadgroup memory that they are
// loaded from.
#pragma once

#include <metal_simdgroup_matrix>

#include "block_sizes.h"
#include "logits.h"

template <typename M>
using Matrix = simdgroup_matrix<M, 8, 8>;

// A lane holds the elements (row, column) and (row, column + 1). Lanes of a row differ in bits 0
// and 3.
struct Place {
  ushort row;
  ushort column;
  explicit Place(ushort lane) thread {
    row = (lane >> 2 & 4) + (lane >> 1 & 3);
    column = (lane >> 2 & 2) * 2 + (lane & 1) * 2;
  }
};

inline float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, ushort(1)));
  return max(x, simd_shuffle_xor(x, ushort(8)));
}

template <typename M>
inline Matrix<M> matrix_of(float first, float second) {
  Matrix<M> held;
  held.thread_elements()[0] = M(first);
  held.thread_elements()[1] = M(second);
  Matrix<M> result;
  result = held;
  return result;
}

// The matrix of eight tile rows from `tile` on, which are its columns where it is transposed: each
// lane reads its two elements, which is no operation of the simdgroup.
template <bool kIsTransposed, typename M>
inline Matrix<M> matrix_at(threadgroup const M* tile, int stride, Place place) {
  const int row = place.row, column = place.column;
  Matrix<M> held;
  if (kIsTransposed) {
    held.thread_elements()[0] = tile[column * stride + row];
    held.thread_elements()[1] = tile[(column + 1) * stride + row];
  } else {
    held.thread_elements()[0] = tile[row * stride + column];
    held.thread_elements()[1] = tile[row * stride + column + 1];
  }
  Matrix<M> result;
  result = held;
  return result;
}

// Whether rows of codes enter products as codes, with scales outside: matrices of half hold the
// difference of a code and a zero point exactly. Else they are dequantized while they are loaded.
template <typename M>
constexpr bool has_exact_codes(int type) {
  return sizeof(M) == 2 && is_code(type);
}

// Whether the scales of an operand's columns are read once for all rows of a tile, which then has
// to lie in one block of tokens.
template <typename M, int D>
inline bool stages_columns(thread const Rows& rows) {
  return sizeof(M) == 4 && is_code(rows.type) && rows.quantization.head_block == 1 &&
         rows.quantization.token_block % BlockSizes<M, D>::kTileRows == 0 &&
         (!rows.has_powers() || rows.power_cells() <= StagedColumns<D>::kCells);
}

// The parameters of columns for a block of tokens; those of the next block have another place.
template <int D>
inline threadgroup float* columns_of_block(threadgroup float* columns, int block) {
  return columns + (block & 1) * StagedColumns<D>::kFloats;
}

// Reads scales and offsets of the block of tokens that `token` is in. A simdgroup reads those of
// its share of the columns, the one that its parts have `by_columns`; the first one the powers.
template <int D>
inline void stage_columns(thread const Rows& rows, int token, threadgroup float* staged,
                          ushort thread_index) {
  constexpr int kShare = D / kSimdgroups;
  const int share = thread_index / 32 * kShare;
  for (int c = share + (thread_index & 31); c < min(share + kShare, rows.columns); c += 32) {
    const float scale = rows.scale_at(token, c);
    staged[c] = scale;
    staged[D + c] = rows.offset_at(token, c, scale);
  }
  if (rows.has_powers() && thread_index < rows.power_cells()) {
    staged[2 * D + thread_index] = float(rows.power_cell(token, thread_index));
  }
}
// What (code * scale + offset) of a token of a staged block is multiplied by.
template <int D>
inline float staged_power(thread const Rows& rows, int token, threadgroup const float* staged) {
  if (!rows.has_powers()) return 1.0f;
  const int in_block = token % rows.quantization.token_block;
  return token_factor(uint(staged[2 * D + in_block / kPowersInCell]), in_block);
}

// The part of a tile's row that a thread brings: eight columns of every kStep-th row. A simdgroup
// brings whole rows, which are contiguous; or, `by_columns`, its share of the columns of each row.
template <int D>
struct TilePart {
  static constant constexpr int kChunks = D / 8, kStep = kThreads / kChunks;
  ushort row;
  ushort chunk;
  ushort column;
  ushort lane;
  explicit TilePart(ushort thread_index, bool by_columns = false) thread {
    constexpr int kShare = kChunks / kSimdgroups;
    lane = thread_index & 31;
    row = by_columns ? lane / kShare : thread_index / kChunks;
    chunk = by_columns ? thread_index / 32 * kShare + lane % kShare : thread_index % kChunks;
    column = 8 * chunk;
  }
};

// How far a chunk is into its block of columns, in chunks; blocks are whole chunks.
inline ushort chunk_in_block(int head_block, ushort chunk) {
  return head_block == 0 ? chunk : ushort(chunk % (head_block / 8));
}
inline bool shares_scales(thread const Rows& rows) {
  return is_code(rows.type) &&
         (rows.quantization.head_block == 0 || rows.quantization.head_block % 8 == 0);
}

// What a thread has read from device memory and not yet written to a tile. One lane has the scale
// and the offset that the chunks of a block share.
struct HeldPart {
  StoredEight elements;
  float scale;
  float offset;
};

// Of row `token`, nothing if it is not inside.
template <typename M, int D>
inline HeldPart read_part(thread const Rows& rows, int token, bool is_inside, TilePart<D> part) {
  const int head_block = rows.quantization.head_block;
  const bool is_exact = has_exact_codes<M>(rows.type);
  HeldPart held;
  held.scale = held.offset = 0.0f;
  if (!is_inside) return held;
  held.elements = read_eight(rows.data, rows.type, token * rows.stride, part.column, rows.columns);
  if (shares_scales(rows) && chunk_in_block(head_block, part.chunk) == 0 &&
      part.column < rows.columns) {
    const int block = rows.column_block(part.column);
    if (!is_exact || head_block == 0) held.scale = rows.scale_at(token, block);
    held.offset =
        is_exact ? rows.code_offset_at(token, block) : rows.offset_at(token, block, held.scale);
  }
  return held;
}

// Writes a part to a tile's row `out`, zeros if the row is not inside, and past the columns. Of
// exact codes, `scale_of_row` takes the row's, or 1 where scales differ along it; where columns are
// staged, `columns` has scales and offsets of the tile's tokens. A tile whose rows are summed takes
// zeros for what is not finite, since it would meet the zeros of hidden pairs there; returns
// whether there was any.
template <typename M, int D, bool kIsSummed>
inline bool write_part(HeldPart held, thread const Rows& rows, int token, bool is_inside,
                       TilePart<D> part, threadgroup M* out, threadgroup float* scale_of_row,
                       bool is_staged, threadgroup const float* columns) {
  const int head_block = rows.quantization.head_block;
  const bool is_exact = has_exact_codes<M>(rows.type);
  const int column = part.column;
  float x[8];
  if (is_inside) {
    decode_eight(held.elements, rows.type, x);
  } else {
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
  }
  if (shares_scales(rows)) {
    const ushort source = part.lane - chunk_in_block(head_block, part.chunk);
    const float factor = is_exact ? 1.0f : simd_shuffle(held.scale, source);
    float offset = held.offset;
    if (rows.quantization.offset_kind != kNoOffset) offset = simd_shuffle(offset, source);
    if (is_exact && part.chunk == 0) *scale_of_row = head_block == 0 ? held.scale : 1.0f;
    for (int i = 0; i < 8; ++i) {
      x[i] = is_inside && column + i < rows.columns ? x[i] * factor + offset : 0.0f;
    }
  } else if (is_code(rows.type) && is_staged) {
    threadgroup const float* staged = columns + column;
    const float power = staged_power<D>(rows, token, columns);
    for (int i = 0; is_inside && i < 8 && column + i < rows.columns; ++i) {
      x[i] = (x[i] * staged[i] + staged[D + i]) * power;
    }
  } else if (is_code(rows.type)) {
    if (is_exact && part.chunk == 0) *scale_of_row = 1.0f;
    const float power = is_inside ? rows.power_at(token) : 1.0f;
    for (int i = 0; is_inside && i < 8 && column + i < rows.columns; ++i) {
      const int block = rows.column_block(column + i);
      if (is_exact) {
        x[i] += rows.code_offset_at(token, block);
      } else {
        const float scale = rows.scale_at(token, block);
        x[i] = (x[i] * scale + rows.offset_at(token, block, scale)) * power;
      }
    }
  }
  if (rows.adds_center && rows.has_center() && is_inside) {
    for (int i = 0; i < 8; ++i) x[i] += rows.center_at(column + i);
  }
  bool is_dirty = false;
  for (int i = 0; i < 8; ++i) {
    const bool is_bad = kIsSummed && !isfinite(x[i]);
    is_dirty |= is_bad;
    out[column + i] = M(is_bad ? 0.0f : x[i]);
  }
  return is_dirty;
}

// Tile rows [0, kRows) = rows [first, first + kRows) of an operand, zeros at and past `end`; see
// `write_part`. Returns whether this thread has found what is not finite.
template <typename M, int D, bool kIsSummed>
inline bool load_tile(thread const Rows& rows, int first, int end, threadgroup M* tile,
                      threadgroup float* scales, bool is_staged, threadgroup float* columns,
                      ushort thread_index) {
  using Sizes = BlockSizes<M, D>;
  constexpr int kStep = TilePart<D>::kStep;
  static_assert(Sizes::kTileRows % kStep == 0, "all threads take part in each step");
  const TilePart<D> part(thread_index);
  threadgroup const float* staged =
      is_staged ? columns_of_block<D>(columns, rows.token_block(first)) : columns;
  bool is_dirty = false;
  for (int r = part.row; r < Sizes::kTileRows; r += kStep) {
    const int token = first + r;
    const bool is_inside = token < end;
    const HeldPart held = read_part<M, D>(rows, token, is_inside, part);
    is_dirty |=
        write_part<M, D, kIsSummed>(held, rows, token, is_inside, part, tile + r * Sizes::kStride,
                                    scales + r, is_staged, staged);
  }
  return is_dirty;
}

// Whether any thread has found something in a tile.
inline bool any_dirty(threadgroup const bool* is_dirty, ushort lane) {
  bool any = false;
  for (int i = 0; i < kSimdgroups; ++i) any |= is_dirty[lane + 32 * i];
  return simd_any(any);
}

// The product of two rows where the second has something that is not finite, else `product`.
inline float product_of_rows(thread const Rows& left, int left_token, thread const Rows& right,
                             int right_token, float product) {
  float sum = 0.0f;
  bool is_bad = false;
  for (int h = 0; h < left.columns; ++h) {
    const float x = right.value(right_token, h);
    is_bad |= !isfinite(x);
    sum += left.value(left_token, h) * x;
  }
  return is_bad ? sum : product;
}

// Adds to sums of eight rows what a tile's zeros stand for: elements of `rows` that are not finite,
// weighted by the lane's two weights of a matrix whose columns are tokens `first` and the
// following, up to `end`.
template <int D>
inline void add_nonfinite(thread const Rows& rows, int first, int end, thread const float* weights,
                          thread Matrix<float>* sums, ushort lane) {
  const Place place(lane);
  for (ushort k = 0; k < 8; ++k) {
    // The lane that has column k of this lane's row.
    const ushort source = ((place.row & 4) | (k & 4) >> 1) * 4 + (place.row & 3) * 2 + (k >> 1 & 1);
    const float weight = simd_shuffle(weights[k & 1], source);
    if (weight == 0.0f || first + k >= end) continue;
    for (int d = 0; d < D / 8; ++d) {
      for (int i = 0; i < 2; ++i) {
        const float x = rows.value(first + k, 8 * d + place.column + i);
        if (!isfinite(x)) sums[d].thread_elements()[i] += weight * x;
      }
    }
  }
}
