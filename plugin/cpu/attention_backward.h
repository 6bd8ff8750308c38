// Flash attention backward in one pass of five products: for each block of keys and each block of
// queries that sees it, recompute S and P, then dV += P^T dO, dP = dO V^T, dS = P (dP - D),
// dK += dS^T Q, dQ += dS K. A task owns the keys of one kv head (or a part of them), so nothing is
// added to by two tasks, and the order of every sum is fixed by the shape alone.
#pragma once

#include <numeric>

#include "backward_rows.h"
#include "microkernel.h"

namespace jax_gluon::cpu {
namespace {

// In the gluon pipeline packed blocks of keys are a ring that is filled ahead, and softmax takes
// one register tile of products, before they leave the registers: the products of the next one do
// not wait for it.
template <class Isa, Pipeline kPipeline>
class AttentionBackward {
  using Core = F32Core<Isa>;
  static constexpr int64_t R = Core::kTileRows, C = Core::kTileColumns;
  // A tile of S and one of dP, of at most 96 x 192 x 4 bytes each, stay in L2 with the block's K
  // and V.
  static constexpr int64_t kRows = 96, kMostTileKeys = 192;
  static constexpr bool kGluon = kPipeline == Pipeline::kGluon;
  static constexpr int64_t kGroupRows = R >= 12 ? R : 2 * R;
  // Columns of a tile come in whole score panels, and in whole tiles of dK and dV.
  static constexpr int64_t kColumnStep = std::lcm(R, C);
  static_assert(kRows % kGroupRows == 0 && kMostTileKeys % kColumnStep == 0);
  // Tasks wanted, so that several cores are busy; a kv head's keys are split no finer than this.
  static constexpr int64_t kTasks = 16, kLeastChunk = 1024;
  using Rules = LogitRules<Isa, kMostTileKeys>;
  using Rows = BackwardRows<Isa, AttentionBackwardCall>;

 public:
  AttentionBackward(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        rows_(call),
        group_(call.N / call.K),
        query_rows_(round_up(call.T, kRows)),
        head_columns_(round_up(call.H, C)),
        value_columns_(round_up(call.V, C)),
        tile_keys_(std::min(kMostTileKeys, round_up(call.cpu_kernel.subtile, kColumnStep))),
        block_keys_(round_up(call.cpu_kernel.block_k, tile_keys_)),
        stages_(call.cpu_kernel.stages),
        scratch_(parallel.threads()) {
    const int64_t heads = std::max<int64_t>(call.B * call.K, 1);
    chunks_ =
        std::max<int64_t>(1, std::min(ceil_div(kTasks, heads), ceil_div(call.S, kLeastChunk)));
    chunk_keys_ = std::max(block_keys_, round_up(ceil_div(call.S, chunks_), block_keys_));
    chunks_ = std::max<int64_t>(1, ceil_div(call.S, chunk_keys_));
  }

  void run() {
    if (call_.B * call_.N == 0) return;
    rows_.find_means(parallel_);
    if (chunks_ > 1) partial_.allocate(chunks_ * call_.B * call_.N * call_.T * head_columns_);
    parallel_.run(call_.B * call_.K * chunks_,
                  [this](int64_t task) { differentiate(task / chunks_, task % chunks_); });
    if (chunks_ == 1) return;
    const int64_t blocks = ceil_div(call_.T, kRows);
    parallel_.run(call_.B * call_.N * blocks,
                  [this, blocks](int64_t task) { sum_chunks(task / blocks, task % blocks); });
  }

 private:
  struct Scratch {
    Buffer<float> query_tiles, query_panels;  // one query head, scaled and plain
    Buffer<float> d_out_tiles, d_out_panels;
    Buffer<float> d_query;                   // [T][head_columns], when there is one chunk
    Buffer<float> d_key, d_value;            // [chunk keys][columns]
    Buffer<float> key_scores, value_scores;  // score panels of each packed key block
    Buffer<float> key_panels;                // value panels (columns of K) of each
    Buffer<float> scores, d_probability;     // [kRows][kMostTileKeys]
    Buffer<float> rows, cap_slope, row_sum;
    bool needs_row_sum = false;  // whether a head's dQ needs the row sums of dS
    Buffer<typename Rows::Statistics> statistics;
  };

  void prepare(Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    s.query_tiles.allocate(query_rows_ * H);
    s.query_panels.allocate(query_rows_ * head_columns_);
    s.d_out_tiles.allocate(query_rows_ * V);
    s.d_out_panels.allocate(query_rows_ * value_columns_);
    if (chunks_ == 1) s.d_query.allocate(query_rows_ * head_columns_);
    s.d_key.allocate(chunk_keys_ * head_columns_);
    s.d_value.allocate(chunk_keys_ * value_columns_);
    s.key_scores.allocate(stages_ * block_keys_ * H);
    s.value_scores.allocate(stages_ * block_keys_ * V);
    s.key_panels.allocate(stages_ * block_keys_ * head_columns_);
    s.scores.allocate(kRows * kMostTileKeys);
    s.d_probability.allocate(kRows * kMostTileKeys);
    s.rows.allocate((2 * std::max(R, C) + 1) * (std::max(H, V) + Isa::kLanes));
    s.cap_slope.allocate(kMostTileKeys);
    s.row_sum.allocate(query_rows_);
    s.statistics.allocate(query_rows_);
  }

  // dQ of a query head before it is scaled: [T][head_columns].
  float* d_query(int64_t b, int64_t n, int64_t chunk, Scratch& s) const {
    if (chunks_ == 1) return s.d_query.get();
    return partial_.get() + ((chunk * call_.B + b) * call_.N + n) * call_.T * head_columns_;
  }

  void differentiate(int64_t head, int64_t chunk) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Range keys{chunk * chunk_keys_, std::min(call_.S, (chunk + 1) * chunk_keys_)};
    const Visibility visibility(call_, b);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    s.needs_row_sum = rows_.key_mean(b, k) && rows_.key_mean_matters();
    std::fill(s.d_key.get(), s.d_key.get() + chunk_keys_ * head_columns_, 0.0f);
    std::fill(s.d_value.get(), s.d_value.get() + chunk_keys_ * value_columns_, 0.0f);
    for (int64_t n = k * group_; n < (k + 1) * group_; ++n) {
      float* dq = d_query(b, n, chunk, s);
      std::fill(dq, dq + call_.T * head_columns_, 0.0f);
      std::fill(s.row_sum.get(), s.row_sum.get() + call_.T, 0.0f);
      const Range rows = visibility.rows_of_keys(keys);
      if (!rows.empty()) {
        const Rules rules(call_, b, n);
        load_queries(b, n, rows, s);
        int64_t packed = keys.begin;
        for (int64_t key0 = keys.begin; key0 < keys.end; key0 += block_keys_) {
          for (; packed < std::min(keys.end, key0 + stages_ * block_keys_); packed += block_keys_) {
            load_keys(visibility, b, k, {packed, std::min(packed + block_keys_, keys.end)}, s);
          }
          const Range block{key0, std::min(key0 + block_keys_, keys.end)};
          key_block(visibility, rules, block, keys.begin, dq, s);
        }
        add_key_mean(b, k, rows, dq, s);
      }
      if (chunks_ == 1) {
        for (int64_t i = 0; i < call_.T; ++i) store_d_query(b, n, i, dq + i * head_columns_);
      }
    }
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t index = (b * call_.S + j) * call_.K + k, at = j - keys.begin;
      store_row<Isa>(call_.d_key, index * call_.H, s.d_key.get() + at * head_columns_, call_.H,
                     call_.scale);
      store_row<Isa>(call_.d_value, index * call_.V, s.d_value.get() + at * value_columns_, call_.V,
                     1.0f);
    }
  }

  void store_d_query(int64_t b, int64_t n, int64_t i, const float* dq) const {
    store_row<Isa>(call_.d_query, ((b * call_.T + i) * call_.N + n) * call_.H, dq, call_.H,
                   call_.scale);
  }

  void sum_chunks(int64_t bn, int64_t block) const {
    const int64_t b = bn / call_.N, n = bn % call_.N;
    const int64_t stride = call_.B * call_.N * call_.T * head_columns_;
    for (int64_t i = block * kRows; i < std::min(call_.T, (block + 1) * kRows); ++i) {
      float* first = partial_.get() + (bn * call_.T + i) * head_columns_;
      for (int64_t c = 1; c < chunks_; ++c) {
        for (int64_t h = 0; h < call_.H; ++h) first[h] += first[c * stride + h];
      }
      store_d_query(b, n, i, first);
    }
  }

  // Packs Q and dO of a query head and the statistics of its rows. Rows that see no key are zeros,
  // and what is not finite is kept out of the panels: there it would meet the zeros of hidden keys.
  // (A row that does see it has NaN in dS already.)
  void load_queries(int64_t b, int64_t n, Range rows, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    float* query = s.rows.get();
    float* d_out = query + R * H;
    float* row = d_out + R * V;
    const int64_t begin = rows.begin / kRows * kRows;
    for (int64_t i0 = begin; i0 < round_up(rows.end, kRows); i0 += R) {
      for (int64_t r = 0; r < R; ++r) {
        const int64_t i = i0 + r;
        float* q = query + r * H;
        float* d = d_out + r * V;
        auto& statistics = s.statistics[i];
        statistics = {};
        if (i < rows.end) {
          rows_.query(b, i, n, q);
          rows_.d_out(b, i, n, d);
          statistics = rows_.statistics(b, i, n, q, d, row);
        }
        if (statistics.empty) {
          std::fill(q, q + H, 0.0f);
          std::fill(d, d + V, 0.0f);
        }
        const float* d_row[1] = {d};
        pack_value_line<Core, float>(d_row, V, s.d_out_panels.get() + i * C, query_rows_ * C);
        if (all_finite<Isa>(q, H)) {
          const float* q_row[1] = {q};
          pack_value_line<Core, float>(q_row, H, s.query_panels.get() + i * C, query_rows_ * C);
        } else {
          std::memcpy(row, q, static_cast<size_t>(H) * sizeof(float));
          replace_nonfinite(row, H);
          const float* q_row[1] = {row};
          pack_value_line<Core, float>(q_row, H, s.query_panels.get() + i * C, query_rows_ * C);
        }
        scale_row<Isa>(q, H, call_.scale * kLog2E);
      }
      interleave<R>(query, H, H, s.query_tiles.get() + i0 * H);
      interleave<R>(d_out, V, V, s.d_out_tiles.get() + i0 * V);
    }
  }

  // Where a block of keys is packed.
  int64_t stage(int64_t key0) const { return key0 / block_keys_ % stages_; }

  void load_keys(const Visibility& visibility, int64_t b, int64_t k, Range keys, Scratch& s) const {
    if (visibility.rows_of_keys(keys).empty()) return;
    const int64_t H = call_.H, V = call_.V, place = stage(keys.begin) * block_keys_;
    float* key = s.rows.get();
    float* value = key + C * H;
    for (int64_t j0 = 0; j0 < round_up(keys.end - keys.begin, C); j0 += C) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t j = keys.begin + j0 + c;
        float* x = key + c * H;
        float* v = value + c * V;
        if (j < keys.end) {
          rows_.key(b, j, k, x);
          rows_.value(b, j, k, v);
        } else {
          std::fill(x, x + H, 0.0f);
          std::fill(v, v + V, 0.0f);
        }
      }
      interleave<C>(key, H, H, s.key_scores.get() + (place + j0) * H);
      interleave<C>(value, V, V, s.value_scores.get() + (place + j0) * V);
      for (int64_t c = 0; c < C; ++c) {
        float* x = key + c * H;
        if (!all_finite<Isa>(x, H)) replace_nonfinite(x, H);
        const float* row[1] = {x};
        pack_value_line<Core, float>(
            row, H, s.key_panels.get() + place * head_columns_ + (j0 + c) * C, block_keys_ * C);
      }
    }
  }

  void key_block(const Visibility& visibility, const Rules& rules, Range keys, int64_t chunk_begin,
                 float* dq, Scratch& s) const {
    const Range rows = visibility.rows_of_keys(keys);
    if (rows.empty()) return;
    for (int64_t i0 = rows.begin / kRows * kRows; i0 < rows.end; i0 += kRows) {
      for (int64_t key0 = keys.begin; key0 < keys.end; key0 += tile_keys_) {
        const int64_t at = key0 - chunk_begin;
        tile(visibility, rules, {key0, std::min(key0 + tile_keys_, keys.end)}, key0 - keys.begin,
             {i0, std::min(i0 + kRows, call_.T)}, dq, s.d_key.get() + at * head_columns_,
             s.d_value.get() + at * value_columns_, s);
      }
    }
  }

  // Keys `keys` stand at `column` of their packed block.
  void tile(const Visibility& visibility, const Rules& rules, Range keys, int64_t column,
            Range rows, float* dq, float* dk, float* dv, Scratch& s) const {
    const int64_t key0 = keys.begin, packed = stage(key0 - column) * block_keys_ + column;
    const Range seen = intersect(visibility.of_rows(rows), keys);
    if (seen.empty()) return;
    // Columns of the tile that any row uses, and the rows that use any.
    const int64_t first = (seen.begin - key0) / kColumnStep * kColumnStep;
    const int64_t last = round_up(seen.end - key0, kColumnStep);
    int64_t row_begin = kRows, row_end = 0;
    for (int64_t g = 0; g < rows.end - rows.begin; g += kGroupRows) {
      const Range group{rows.begin + g, std::min(rows.begin + g + kGroupRows, rows.end)};
      const Range keys_seen = intersect(visibility.of_rows(group), keys);
      if (keys_seen.empty() || !rules.any_visible(group, keys_seen)) {
        zero_outside(s, g, first, last, first, first);
        continue;
      }
      const Range columns{(keys_seen.begin - key0) / C * C, round_up(keys_seen.end - key0, C)};
      row_begin = std::min(row_begin, g);
      row_end = g + kGroupRows;
      zero_outside(s, g, first, last, columns.begin, columns.end);
      const Range padded{key0 + columns.begin, key0 + columns.end};
      if (kGluon && sees_all(visibility, rules, group, padded, s)) {
        multiply_subtiles(g, columns, packed, rows, s);
      } else {
        multiply_keys(g, columns, packed, rows, s);
        softmax(visibility, rules, g, columns, key0, rows, s);
      }
      accumulate_d_query(g, columns.begin, columns.end, packed, rows, dq, s);
    }
    if (row_begin >= row_end) return;
    for (int64_t j = first; j < last; j += R) {
      const float* p = s.scores.get() + row_begin * kMostTileKeys + j;
      const float* ds = s.d_probability.get() + row_begin * kMostTileKeys + j;
      const int64_t at = (rows.begin + row_begin) * C, depth = row_end - row_begin;
      for (int64_t c = 0; c < value_columns_; c += C) {
        transposed_tile<Isa, kMostTileKeys>(p, s.d_out_panels.get() + c * query_rows_ + at, depth,
                                            dv + j * value_columns_ + c, value_columns_);
      }
      for (int64_t c = 0; c < head_columns_; c += C) {
        transposed_tile<Isa, kMostTileKeys>(ds, s.query_panels.get() + c * query_rows_ + at, depth,
                                            dk + j * head_columns_ + c, head_columns_);
      }
    }
  }

  // Whether the logits of a whole group of rows with `keys` are nothing but their products.
  bool sees_all(const Visibility& visibility, const Rules& rules, Range group, Range keys,
                const Scratch& s) const {
    if (rules.any() || group.end - group.begin < kGroupRows || keys.end > call_.S) return false;
    if (s.needs_row_sum) return false;
    for (int64_t i = group.begin; i < group.end; ++i) {
      if (s.statistics[i].empty || s.statistics[i].centre != 0.0f) return false;
    }
    // Ends of what rows see never decrease but to those that see nothing, which come last.
    return contains(visibility.of_row(group.begin), keys) &&
           contains(visibility.of_row(group.end - 1), keys);
  }

  // P and dS of a group that sees all: a register tile of products is one subtile.
  void multiply_subtiles(int64_t g, Range columns, int64_t packed, Range rows, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    for (int64_t t = g; t < g + kGroupRows; t += R) {
      RowStatistics<R> statistics;
      for (int64_t r = 0; r < R; ++r) {
        const auto& row = s.statistics[rows.begin + t + r];
        statistics.maximum[r] = row.maximum;
        statistics.log2_sum[r] = row.log2_sum;
        statistics.delta[r] = row.delta;
      }
      const float* query = s.query_tiles.get() + (rows.begin + t) * H;
      const float* d_out = s.d_out_tiles.get() + (rows.begin + t) * V;
      for (int64_t j = columns.begin; j < columns.end; j += C) {
        float* p = s.scores.get() + t * kMostTileKeys + j;
        backward_tile<Core, false>(query, s.key_scores.get() + (packed + j) * H, H, statistics,
                                   nullptr, p, kMostTileKeys);
        backward_tile<Core, true>(d_out, s.value_scores.get() + (packed + j) * V, V, statistics, p,
                                  s.d_probability.get() + t * kMostTileKeys + j, kMostTileKeys);
      }
    }
  }

  // S and dP of a group.
  void multiply_keys(int64_t g, Range columns, int64_t packed, Range rows, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      for (int64_t t = g; t < g + kGroupRows; t += R) {
        score_tile<Core>(s.query_tiles.get() + (rows.begin + t) * H,
                         s.key_scores.get() + (packed + j) * H, H,
                         s.scores.get() + t * kMostTileKeys + j, kMostTileKeys);
        score_tile<Core>(s.d_out_tiles.get() + (rows.begin + t) * V,
                         s.value_scores.get() + (packed + j) * V, V,
                         s.d_probability.get() + t * kMostTileKeys + j, kMostTileKeys);
      }
    }
  }

  // P and dS of a group, in their place.
  void softmax(const Visibility& visibility, const Rules& rules, int64_t g, Range columns,
               int64_t key0, Range rows, Scratch& s) const {
    const int64_t begin = columns.begin, end = columns.end;
    for (int64_t r = g; r < g + kGroupRows; ++r) {
      const int64_t i = rows.begin + r;
      const Range visible = i < rows.end ? visibility.of_row(i) : Range{};
      if (visible.empty() || s.statistics[i].empty) {
        zero_row(s, r, begin, end);
        continue;
      }
      s.row_sum[i] +=
          softmax_backward_row<Isa>(rules, s.statistics[i], i, key0, begin, end, visible,
                                    call_.soft_cap, s.scores.get() + r * kMostTileKeys,
                                    s.d_probability.get() + r * kMostTileKeys, s.cap_slope.get());
    }
  }

  static void zero_row(Scratch& s, int64_t r, int64_t begin, int64_t end) {
    std::fill(s.scores.get() + r * kMostTileKeys + begin, s.scores.get() + r * kMostTileKeys + end,
              0.0f);
    std::fill(s.d_probability.get() + r * kMostTileKeys + begin,
              s.d_probability.get() + r * kMostTileKeys + end, 0.0f);
  }

  // A row group's share of columns [first, last) that it does not compute.
  static void zero_outside(Scratch& s, int64_t g, int64_t first, int64_t last, int64_t begin,
                           int64_t end) {
    for (int64_t r = g; r < g + kGroupRows; ++r) {
      zero_row(s, r, first, begin);
      zero_row(s, r, end, last);
    }
  }

  void accumulate_d_query(int64_t g, int64_t begin, int64_t end, int64_t packed, Range rows,
                          float* dq, Scratch& s) const {
    static constexpr float kOne[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static_assert(R <= 16);
    const int64_t at = packed % block_keys_ + begin;
    const float* keys =
        s.key_panels.get() + packed / block_keys_ * block_keys_ * head_columns_ + at * C;
    for (int64_t t = g; t < g + kGroupRows; t += R) {
      const int64_t i = rows.begin + t;
      if (i >= rows.end) break;
      const float* ds = s.d_probability.get() + t * kMostTileKeys + begin;
      if (i + R <= call_.T) {
        for (int64_t c = 0; c < head_columns_; c += C) {
          value_tile<Core, kMostTileKeys>(ds, keys + c * block_keys_, end - begin,
                                          dq + i * head_columns_ + c, head_columns_, kOne);
        }
        continue;
      }
      // The last tile may pass row T, where dQ ends.
      alignas(kAlignment) float edge[R * C];
      for (int64_t c = 0; c < head_columns_; c += C) {
        std::fill(edge, edge + R * C, 0.0f);
        value_tile<Core, kMostTileKeys>(ds, keys + c * block_keys_, end - begin, edge, C, kOne);
        for (int64_t r = 0; i + r < call_.T; ++r) {
          for (int64_t x = 0; x < C; ++x) dq[(i + r) * head_columns_ + c + x] += edge[r * C + x];
        }
      }
    }
  }

  // dQ = dS (K + mean): the mean's part is rowsum(dS) * mean.
  void add_key_mean(int64_t b, int64_t k, Range rows, float* dq, Scratch& s) const {
    if (!s.needs_row_sum) return;
    const float* mean = rows_.key_mean(b, k);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t h = 0; h < call_.H; ++h) dq[i * head_columns_ + h] += s.row_sum[i] * mean[h];
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  Rows rows_;
  const int64_t group_, query_rows_, head_columns_, value_columns_;
  const int64_t tile_keys_, block_keys_, stages_;
  int64_t chunks_ = 1, chunk_keys_ = 0;
  Buffer<float> partial_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
