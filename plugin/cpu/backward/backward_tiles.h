// Tiles of a backward pass: queries and keys packed for their products, P and dP, and what dS adds
// to dQ, dK and dV.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/backward/backward_blocks.h"
#include "cpu/backward/backward_rows.h"
#include "cpu/memory/buffer.h"
#include "cpu/rows/dropout_row.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, Kernel kKernel>
class BackwardTiles {
  using Core = F32Core<Isa>;
  using Blocks = BackwardBlocks<Isa, kKernel>;
  using Block = BackwardBlock<Isa>;
  using Part = BackwardPart;
  using Rows = BackwardRows<Isa, AttentionBackwardCall>;
  static constexpr int64_t R = Core::kTileRows, C = Core::kTileColumns, W = Isa::kLanes;
  static constexpr int64_t kGroupRows = Core::kGroupRows;
  static constexpr int64_t kMaxTileKeys = Blocks::kMaxTileKeys;
  using Rules = LogitRules<Isa, kMaxTileKeys>;

 public:
  BackwardTiles(const AttentionBackwardCall& call, const Rows& rows, const Blocks& blocks,
                const MaskTiles& mask_tiles)
      : call_(call), rows_(rows), blocks_(blocks), mask_tiles_(mask_tiles) {}

  struct Scratch {
    Buffer<float> query_tiles, query_panels;  // of a block of rows, scaled and plain
    Buffer<float> d_out_tiles, d_out_panels;
    Buffer<float> d_query;                   // [block rows][head_columns]
    Buffer<float> key_scores, value_scores;  // score panels of the part's keys
    Buffer<float> key_panels;                // value panels (columns of K)
    // [tiles][block rows][kMaxTileKeys]; cap_slope only under a soft cap
    Buffer<float> scores, d_probability, cap_slope;
    Buffer<float> rows, row_sum;
    Buffer<float> weighted, total;  // [block rows][W], lanes of rowsum(P dP) and rowsum(P)
    bool needs_row_sum = false;     // whether dQ needs the row sums of dS
    Buffer<typename Rows::Statistics> statistics;
    Buffer<Range> columns;  // [tiles][groups of rows]: what each computes
  };

  void prepare(Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    s.query_tiles.allocate(blocks_.block_rows * H);
    s.query_panels.allocate(blocks_.block_rows * blocks_.head_columns);
    s.d_out_tiles.allocate(blocks_.block_rows * V);
    s.d_out_panels.allocate(blocks_.block_rows * blocks_.value_columns);
    s.d_query.allocate(blocks_.block_rows * blocks_.head_columns);
    s.key_scores.allocate(blocks_.part_keys * H);
    s.value_scores.allocate(blocks_.part_keys * V);
    s.key_panels.allocate(blocks_.part_keys * blocks_.head_columns);
    const int64_t scores = blocks_.block_tiles * blocks_.block_rows * kMaxTileKeys;
    s.scores.allocate(scores);
    s.d_probability.allocate(scores);
    if (call_.soft_cap != 0.0f) s.cap_slope.allocate(scores);
    s.rows.allocate((2 * std::max(R, C) + 1) * (std::max(H, V) + W));
    s.row_sum.allocate(blocks_.block_rows);
    s.weighted.allocate(blocks_.block_rows * W);
    s.total.allocate(blocks_.block_rows * W);
    s.statistics.allocate(blocks_.block_rows);
    s.columns.allocate(blocks_.block_tiles * (blocks_.block_rows / kGroupRows));
  }

  // Packs Q and dO of a block of rows and their statistics. Rows that see no key are zeros, and
  // what is not finite is kept out of the panels: there it would meet the zeros of hidden keys.
  // (A row that does see it has NaN in dS already.)
  void load_queries(int64_t b, const Block& block, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V, count = block.count();
    float* query = s.rows.get();
    float* d_out = query + R * H;
    float* row = d_out + R * V;
    if (block.heads == 1) {
      touch_rows(call_.query, b, block.queries.begin, block.queries.end, block.n, H);
      touch_rows(call_.d_out, b, block.queries.begin, block.queries.end, block.n, V);
      if (blocks_.reads_output && !call_.is_partial) {
        touch_rows(call_.out, b, block.queries.begin, block.queries.end, block.n, V);
      }
    }
    for (int64_t t = 0; t < round_up(count, kGroupRows); t += R) {
      for (int64_t r = 0; r < R; ++r) {
        float* q = query + r * H;
        float* d = d_out + r * V;
        auto& statistics = s.statistics[t + r];
        statistics = {};
        if (t + r < count) {
          const int64_t i = block.query_of(t + r), n = block.head_of(t + r);
          rows_.query(b, i, n, q);
          rows_.d_out(b, i, n, d);
          statistics = rows_.statistics(b, i, n, q, d);
          if (blocks_.reads_output && !statistics.empty && !statistics.has_mean) {
            statistics.delta += rows_.output_delta(b, i, n, d, row);
          }
        }
        if (statistics.empty) {
          std::fill(q, q + H, 0.0f);
          std::fill(d, d + V, 0.0f);
        }
        const float* d_row[1] = {d};
        pack_value_line<Core, float>(d_row, V, s.d_out_panels.get() + (t + r) * C,
                                     blocks_.block_rows * C);
        const float* q_row[1] = {q};
        if (!all_finite<Isa>(q, H)) {
          std::memcpy(row, q, static_cast<size_t>(H) * sizeof(float));
          replace_nonfinite(row, H);
          q_row[0] = row;
        }
        pack_value_line<Core, float>(q_row, H, s.query_panels.get() + (t + r) * C,
                                     blocks_.block_rows * C);
        scale_row<Isa>(q, H, call_.scale * kLog2E);
      }
      interleave<Isa, R>(query, H, H, s.query_tiles.get() + t * H);
      interleave<Isa, R>(d_out, V, V, s.d_out_tiles.get() + t * V);
    }
  }

  // Packs the part's keys before `end`, and some blocks beyond, block by block.
  void load_keys_to(int64_t end, Part& part, Scratch& s) const {
    if (part.packed >= end) return;
    const int64_t last =
        std::min(part.keys.end, round_up(end - part.first_key, blocks_.block_keys) +
                                    part.first_key + (blocks_.stages - 1) * blocks_.block_keys);
    for (; part.packed < last; part.packed += blocks_.block_keys) {
      load_keys(part, {part.packed, std::min(part.packed + blocks_.block_keys, part.keys.end)}, s);
    }
  }

  // P and dP of a block of rows and tile t of the part's keys, kept as tile `kept`.
  void find_probabilities(const Block& block, const Part& part, int64_t t, int64_t kept,
                          Scratch& s) const {
    const int64_t packed = t * blocks_.tile_keys, key0 = part.first_key + packed;
    // Heads that share a block may see different keys.
    const Rules rules =
        block.heads == 1 ? rules_of(part.b, block.n) : Rules(call_, part.b, block.n);
    for (int64_t g = 0; g < block.count(); g += kGroupRows) {
      const Range queries = block.queries_of(g);
      const Range seen = rules.seen(
          queries, intersect(part.visibility.of_rows(queries), {key0, key0 + blocks_.tile_keys}));
      Range& columns = columns_of(kept, g, s);
      columns = {};
      if (seen.empty()) continue;
      columns = {(seen.begin - key0) / C * C, round_up(seen.end - key0, C)};
      const Range padded{key0 + columns.begin, key0 + columns.end};
      if (Blocks::kGluon && !call_.dropout && !rules.any(queries, padded) &&
          sees_all(block, part.visibility, g, padded, s)) {
        multiply_subtiles(g, columns, packed, kept, s);
      } else {
        multiply_keys(g, columns, packed, kept, s);
        softmax(block, part, g, columns, key0, kept, s);
      }
    }
  }

  // From P and dP of a tile: dS, and its share of dQ, dK and dV.
  void add_gradients(int64_t rows, const Part& part, int64_t t, int64_t kept, Scratch& s) const {
    const int64_t packed = t * blocks_.tile_keys, groups = round_up(rows, kGroupRows);
    // Columns of the tile that any row uses, and the rows that use any.
    Range seen{kMaxTileKeys, 0}, used{groups, 0};
    for (int64_t g = 0; g < groups; g += kGroupRows) {
      const Range columns = columns_of(kept, g, s);
      if (columns.empty()) continue;
      seen = {std::min(seen.begin, columns.begin), std::max(seen.end, columns.end)};
      used = {std::min(used.begin, g), g + kGroupRows};
    }
    if (used.empty()) return;
    seen = {seen.begin / R * R, round_up(seen.end, R)};
    for (int64_t g = used.begin; g < used.end; g += kGroupRows) {
      const Range columns = columns_of(kept, g, s);
      for (int64_t r = g; r < g + kGroupRows; ++r) {
        const TileRow row = tile_row(row_offset(kept, r), columns, s);
        if (columns.empty()) {
          zero_row(row, seen);
          continue;
        }
        zero_row(row, {seen.begin, columns.begin});
        zero_row(row, {columns.end, seen.end});
        if (call_.dropout) {
          s.row_sum[r] += gradient_row<Isa, true>(s.statistics[r], row, call_.dropout.scale);
        } else {
          s.row_sum[r] += gradient_row<Isa>(s.statistics[r], row);
        }
      }
      if (!columns.empty()) accumulate_d_query(g, columns, packed, kept, s);
    }
    for (int64_t j = seen.begin; j < seen.end; j += R) {
      used = groups_of({j, j + R}, kept, groups, s);
      if (used.empty()) continue;
      const int64_t at = row_offset(kept, used.begin) + j, depth = used.end - used.begin;
      float* dv = part.d_value + (packed + j) * blocks_.value_columns;
      float* dk = part.d_key + (packed + j) * blocks_.head_columns;
      for (int64_t c = 0; c < blocks_.value_columns; c += C) {
        transposed_tile<Isa, kMaxTileKeys>(
            s.scores.get() + at, s.d_out_panels.get() + c * blocks_.block_rows + used.begin * C,
            depth, dv + c, blocks_.value_columns);
      }
      for (int64_t c = 0; c < blocks_.head_columns; c += C) {
        transposed_tile<Isa, kMaxTileKeys>(
            s.d_probability.get() + at,
            s.query_panels.get() + c * blocks_.block_rows + used.begin * C, depth, dk + c,
            blocks_.head_columns);
      }
    }
  }

 private:
  Rules rules_of(int64_t b, int64_t n) const { return Rules(call_, b, n, mask_tiles_.plane(b, n)); }

  // Where row r of a tile starts.
  int64_t row_offset(int64_t tile, int64_t r) const {
    return (tile * blocks_.block_rows + r) * kMaxTileKeys;
  }
  Range& columns_of(int64_t tile, int64_t g, Scratch& s) const {
    return s.columns[tile * (blocks_.block_rows / kGroupRows) + g / kGroupRows];
  }

  // From the first to the last of `groups` rows whose group uses any of `columns` of a tile.
  Range groups_of(Range columns, int64_t tile, int64_t groups, Scratch& s) const {
    Range used{groups, 0};
    for (int64_t g = 0; g < groups; g += kGroupRows) {
      if (intersect(columns_of(tile, g, s), columns).empty()) continue;
      used = {std::min(used.begin, g), g + kGroupRows};
    }
    return used;
  }

  void load_keys(const Part& part, Range keys, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V, packed = keys.begin - part.first_key;
    touch_rows(call_.key, part.b, keys.begin, keys.end, part.k, H);
    touch_rows(call_.value, part.b, keys.begin, keys.end, part.k, V);
    float* key = s.rows.get();
    float* value = key + C * H;
    for (int64_t j0 = 0; j0 < round_up(keys.end - keys.begin, C); j0 += C) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t j = keys.begin + j0 + c;
        float* x = key + c * H;
        float* v = value + c * V;
        if (j < keys.end) {
          rows_.key(part.b, j, part.k, x);
          rows_.value(part.b, j, part.k, v);
        } else {
          std::fill(x, x + H, 0.0f);
          std::fill(v, v + V, 0.0f);
        }
      }
      interleave<Isa, C>(key, H, H, s.key_scores.get() + (packed + j0) * H);
      interleave<Isa, C>(value, V, V, s.value_scores.get() + (packed + j0) * V);
      for (int64_t c = 0; c < C; ++c) {
        float* x = key + c * H;
        if (!all_finite<Isa>(x, H)) replace_nonfinite(x, H);
        const float* row[1] = {x};
        pack_value_line<Core, float>(row, H, s.key_panels.get() + (packed + j0 + c) * C,
                                     blocks_.part_keys * C);
      }
    }
  }

  // Whether all rows of a whole group see `keys` and add nothing to their products.
  bool sees_all(const Block& block, const Visibility& visibility, int64_t g, Range keys,
                const Scratch& s) const {
    if (g + kGroupRows > block.count() || keys.end > call_.S) return false;
    for (int64_t r = g; r < g + kGroupRows; ++r) {
      if (s.statistics[r].empty || s.statistics[r].center != 0.0f) return false;
    }
    return visibility.all_see(block.queries_of(g), keys);
  }

  // P and dP of a group that sees all: a register tile of products is one subtile.
  void multiply_subtiles(int64_t g, Range columns, int64_t packed, int64_t kept, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    for (int64_t t = g; t < g + kGroupRows; t += R) {
      RowStatistics<R> statistics;
      for (int64_t r = 0; r < R; ++r) {
        statistics.maximum[r] = s.statistics[t + r].maximum;
        statistics.log2_sum[r] = s.statistics[t + r].log2_sum;
      }
      for (int64_t j = columns.begin; j < columns.end; j += C) {
        const int64_t at = row_offset(kept, t) + j;
        float* p = s.scores.get() + at;
        backward_tile<Core, false, kMaxTileKeys>(s.query_tiles.get() + t * H,
                                                 s.key_scores.get() + (packed + j) * H, H,
                                                 statistics, nullptr, p, s.total.get() + t * W);
        backward_tile<Core, true, kMaxTileKeys>(
            s.d_out_tiles.get() + t * V, s.value_scores.get() + (packed + j) * V, V, statistics, p,
            s.d_probability.get() + at, s.weighted.get() + t * W);
      }
    }
  }

  // S and dP of a group.
  void multiply_keys(int64_t g, Range columns, int64_t packed, int64_t kept, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      for (int64_t t = g; t < g + kGroupRows; t += R) {
        const int64_t at = row_offset(kept, t) + j;
        score_tile<Core>(s.query_tiles.get() + t * H, s.key_scores.get() + (packed + j) * H, H,
                         s.scores.get() + at, kMaxTileKeys);
        score_tile<Core>(s.d_out_tiles.get() + t * V, s.value_scores.get() + (packed + j) * V, V,
                         s.d_probability.get() + at, kMaxTileKeys);
      }
    }
  }

  // P of a group, in place of S, and its share of the row sums.
  void softmax(const Block& block, const Part& part, int64_t g, Range columns, int64_t key0,
               int64_t kept, Scratch& s) const {
    uint8_t scratch[DropoutRow<Isa>::bytes(kMaxTileKeys)];
    for (int64_t r = g; r < g + kGroupRows; ++r) {
      TileRow row = tile_row(row_offset(kept, r), columns, s);
      row.query = block.query_of(r);
      row.key0 = key0;
      if (r < block.count()) row.visible = part.visibility.of_row(row.query);
      if (row.visible.empty() || s.statistics[r].empty) {
        zero_row(row, columns);
        continue;
      }
      const Rules rules = rules_of(part.b, block.head_of(r));
      const DropoutRow<Isa> dropout(call_, part.b, block.head_of(r));
      const uint8_t* keep = nullptr;
      if (dropout.any()) {
        keep = dropout.find(row.query, key0 + columns.begin, key0 + columns.end, scratch);
        drop_gradient<Isa>(keep, dropout.scale(), row);
      }
      probability_row<Isa>(rules, s.statistics[r], row, s.weighted.get() + r * W,
                           s.total.get() + r * W);
      if (keep) mark_dropped<Isa>(keep, row);
    }
  }

  // `columns` of the row that starts there.
  TileRow tile_row(int64_t offset, Range columns, Scratch& s) const {
    TileRow row;
    row.columns = columns;
    row.p = s.scores.get() + offset;
    row.d_p = s.d_probability.get() + offset;
    if (call_.soft_cap != 0.0f) row.cap_slope = s.cap_slope.get() + offset;
    return row;
  }

  static void zero_row(const TileRow& row, Range columns) {
    if (columns.empty()) return;
    std::fill(row.p + columns.begin, row.p + columns.end, 0.0f);
    std::fill(row.d_p + columns.begin, row.d_p + columns.end, 0.0f);
  }

  void accumulate_d_query(int64_t g, Range columns, int64_t packed, int64_t kept,
                          Scratch& s) const {
    static constexpr float kOne[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static_assert(R <= 16);
    const float* keys = s.key_panels.get() + (packed + columns.begin) * C;
    for (int64_t t = g; t < g + kGroupRows; t += R) {
      const float* ds = s.d_probability.get() + row_offset(kept, t) + columns.begin;
      for (int64_t c = 0; c < blocks_.head_columns; c += C) {
        value_tile<Core, kMaxTileKeys>(
            ds, keys + c * blocks_.part_keys, columns.end - columns.begin,
            s.d_query.get() + t * blocks_.head_columns + c, blocks_.head_columns, kOne);
      }
    }
  }

  const AttentionBackwardCall& call_;
  const Rows& rows_;
  const Blocks& blocks_;
  const MaskTiles& mask_tiles_;
};

}  // namespace
}  // namespace jax_gluon::cpu
