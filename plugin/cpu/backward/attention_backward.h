// Flash attention backward in one pass of five products. For each block of queries: recompute S and
// dP = dO V^T for all keys that it sees and keep P and dP; then D = rowsum(P dP) is known, and
// dS = P (dP - D), dV += P^T dO, dK += dS^T Q, dQ = dS K. An output that was rounded has no part in
// D, so rows of dS sum to 0; of an exact one D = rowsum(dO O), and P and dP are kept for one tile
// of keys only. A task owns the rows of one kv head (or a part of them) and sums of
// its own for dK and dV, and the order of every sum is fixed by the shape alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/backward/backward_rows.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

// In the gluon pipeline blocks of keys are packed ahead of their use, and P is made of one register
// tile of products, before they leave the registers: the products of the next one do not wait for
// it.
template <class Isa, Kernel kKernel>
class AttentionBackward {
  using Core = F32Core<Isa>;
  static constexpr int64_t R = Core::kTileRows, C = Core::kTileColumns, W = Isa::kLanes;
  // Rows in a block: what packed keys, dK and dV are read for.
  static constexpr int64_t kMaxRows = 96, kMinRows = 24;
  // P and dP of a block are rows of at most this many keys, then of the next ones.
  static constexpr int64_t kMaxTileKeys = 192;
  // Elements of P of a block, at most, unless that makes it too low: they are read back once.
  static constexpr int64_t kMaxScores = int64_t{1} << 20;
  static constexpr bool kGluon = kKernel == Kernel::kGluon;
  static constexpr int64_t kGroupRows = Core::kGroupRows;
  // Columns of a tile come in whole score panels, and in whole tiles of dK and dV.
  static constexpr int64_t kColumnStep = std::lcm(R, C);
  static_assert(kMaxRows % kGroupRows == 0 && kMaxTileKeys % kColumnStep == 0);
  // Tasks wanted, so that several cores are busy; but a kv head's rows are split no finer than
  // this, and no more often, since each part has dK and dV of all keys that it sees.
  static constexpr int64_t kTasks = 16, kMinPart = 512, kMaxParts = 4;
  using Rules = LogitRules<Isa, kMaxTileKeys>;
  using Rows = BackwardRows<Isa, AttentionBackwardCall>;

 public:
  AttentionBackward(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        rows_(call),
        output_is_exact_(rows_.output_is_exact()),
        group_(call.N / call.K),
        head_columns_(round_up(call.H, C)),
        value_columns_(round_up(call.V, C)),
        tile_keys_(std::min({kMaxTileKeys, round_up(subtile_of(call.cpu_kernel), kColumnStep),
                             round_up(std::max<int64_t>(call.S, 1), kColumnStep)})),
        block_keys_(round_up(call.cpu_kernel.block_k, tile_keys_)),
        stages_(std::max<int64_t>(call.cpu_kernel.stages, 1)),
        ahead_(stages_ * block_keys_),
        scratch_(parallel.threads()) {
    const int64_t rows = std::max<int64_t>(call.T, 1);
    const int64_t kept = output_is_exact_ ? tile_keys_ : most_keys(kMaxRows);
    const int64_t fit = kMaxScores / std::max<int64_t>(kept, 1);
    const int64_t most_rows =
        std::min(std::max(fit / kGroupRows * kGroupRows, round_up(kMinRows, kGroupRows)), kMaxRows);
    block_heads_ = std::max<int64_t>(std::min(most_rows / rows, group_), 1);
    block_rows_ = std::min(most_rows, round_up(block_heads_ * rows, kGroupRows));
    const int64_t heads = std::max<int64_t>(call.B * call.K, 1);
    const int64_t parts = std::min({ceil_div(kTasks, heads), ceil_div(rows, kMinPart), kMaxParts});
    part_rows_ = round_up(ceil_div(rows, parts), block_rows_);
    parts_ = ceil_div(rows, part_rows_);
    // Keys are counted from the first of a whole tile.
    part_keys_ = round_up(most_keys(part_rows_), tile_keys_) + tile_keys_;
    block_tiles_ = output_is_exact_ ? 1 : ceil_div(most_keys(block_rows_), tile_keys_) + 1;
  }

  // A larger block is for long rows, which every block of queries reads again.
  static KernelOffer offer(const AttentionBackwardCall& call) {
    const SizeRange tile = {kMaxTileKeys, kMaxTileKeys / 2, kMaxTileKeys, kMaxTileKeys / 2};
    if (!kGluon) return {kKernel, "float32", "", tile, {}, {}};
    const bool is_long = call.H > 64 && max_visible_keys(call) >= 2048;
    const SizeRange block_k = {is_long ? 4 * kMaxTileKeys : kMaxTileKeys, kMaxTileKeys,
                               kMaxBlockKeys, kMaxTileKeys / 2};
    SizeRange subtile = tile;
    if (!is_long) subtile.preferred = tile.min;
    return {kKernel, "float32", "", block_k, subtile, {2, 2, kMaxStages, 1}};
  }

  void describe(KernelRun& run) const {
    run.block_k = kGluon ? block_keys_
                         : std::min(kMaxTileKeys, round_up(call_.cpu_kernel.block_k, kColumnStep));
    run.subtile =
        kGluon ? std::min(kMaxTileKeys, round_up(call_.cpu_kernel.subtile, kColumnStep)) : 0;
    run.stages = kGluon ? stages_ : 0;
  }

  void run() {
    if (call_.B * call_.N == 0) return;
    rows_.find_centers(parallel_);
    const int64_t heads = call_.B * call_.K;
    if (parts_ > 1) {
      d_key_parts_.allocate(heads * parts_ * part_keys_ * head_columns_);
      d_value_parts_.allocate(heads * parts_ * part_keys_ * value_columns_);
    }
    parallel_.run(heads * parts_, [this](int64_t task) {
      // Last rows first: with causal masking they are the longest.
      differentiate(task / parts_, parts_ - 1 - task % parts_);
    });
    if (parts_ == 1) return;
    const int64_t blocks = ceil_div(call_.S, kMaxRows);
    parallel_.run(heads * blocks, [this, blocks](int64_t task) {
      const int64_t first = task % blocks * kMaxRows;
      sum_parts(task / blocks, {first, std::min(call_.S, first + kMaxRows)});
    });
  }

 private:
  // Keys whose P and dP are kept at a time: in the baseline pipeline those of a block.
  static int64_t subtile_of(const KernelChoice& kernel) {
    return kGluon ? kernel.subtile : kernel.block_k;
  }

  struct Scratch {
    Buffer<float> query_tiles, query_panels;  // of a block of rows, scaled and plain
    Buffer<float> d_out_tiles, d_out_panels;
    Buffer<float> d_query;                   // [block rows][head_columns]
    Buffer<float> d_key, d_value;            // [part keys][columns], where there is one part
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

  // A part of the rows of a kv head, while its task runs.
  struct Part {
    const Visibility& visibility;
    int64_t b, k;
    Range keys;      // that any of its rows sees
    int64_t origin;  // where packed keys, dK and dV start
    int64_t packed;  // keys before this are packed
    float *d_key, *d_value;
  };

  // Rows that are computed together: of several query heads of a kv head where each has few.
  struct Block {
    int64_t n, heads;
    Range queries;
    int64_t count() const { return heads * height(); }
    int64_t height() const { return queries.end - queries.begin; }
    int64_t head_of(int64_t r) const { return heads == 1 ? n : n + r / height(); }
    int64_t query_of(int64_t r) const { return queries.begin + (heads == 1 ? r : r % height()); }
    // The queries among the group of rows from g on.
    Range queries_of(int64_t g) const {
      if (heads > 1) return queries;
      return {queries.begin + g, std::min(queries.begin + g + kGroupRows, queries.end)};
    }
  };

  // No more keys are seen by this many adjacent rows.
  int64_t most_keys(int64_t rows) const {
    const int64_t left = call_.window_left, right = call_.causal ? 0 : call_.window_right;
    if (left < 0 || right < 0 || left >= call_.S || right >= call_.S) return call_.S;
    return std::min(call_.S, rows + left + right);
  }

  void prepare(Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    s.query_tiles.allocate(block_rows_ * H);
    s.query_panels.allocate(block_rows_ * head_columns_);
    s.d_out_tiles.allocate(block_rows_ * V);
    s.d_out_panels.allocate(block_rows_ * value_columns_);
    s.d_query.allocate(block_rows_ * head_columns_);
    if (parts_ == 1) {
      s.d_key.allocate(part_keys_ * head_columns_);
      s.d_value.allocate(part_keys_ * value_columns_);
    }
    s.key_scores.allocate(part_keys_ * H);
    s.value_scores.allocate(part_keys_ * V);
    s.key_panels.allocate(part_keys_ * head_columns_);
    const int64_t scores = block_tiles_ * block_rows_ * kMaxTileKeys;
    s.scores.allocate(scores);
    s.d_probability.allocate(scores);
    if (call_.soft_cap != 0.0f) s.cap_slope.allocate(scores);
    s.rows.allocate((2 * std::max(R, C) + 1) * (std::max(H, V) + W));
    s.row_sum.allocate(block_rows_);
    s.weighted.allocate(block_rows_ * W);
    s.total.allocate(block_rows_ * W);
    s.statistics.allocate(block_rows_);
    s.columns.allocate(block_tiles_ * (block_rows_ / kGroupRows));
  }

  Range part_range(int64_t part) const {
    return {part * part_rows_, std::min(call_.T, (part + 1) * part_rows_)};
  }
  int64_t origin_of(Range keys) const { return keys.begin / tile_keys_ * tile_keys_; }

  void differentiate(int64_t head, int64_t part_index) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Visibility visibility(call_, b);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    s.needs_row_sum = rows_.key_center(b, k) && rows_.key_center_matters();
    const Range rows = part_range(part_index), keys = visibility.of_rows(rows);
    Part part{visibility,     b, k, keys, origin_of(keys), origin_of(keys), s.d_key.get(),
              s.d_value.get()};
    if (parts_ > 1) {
      const int64_t at = (head * parts_ + part_index) * part_keys_;
      part.d_key = d_key_parts_.get() + at * head_columns_;
      part.d_value = d_value_parts_.get() + at * value_columns_;
    }
    if (!keys.empty()) {
      const int64_t count = round_up(keys.end - part.origin, kColumnStep);
      std::fill(part.d_key, part.d_key + count * head_columns_, 0.0f);
      std::fill(part.d_value, part.d_value + count * value_columns_, 0.0f);
    }
    const int64_t end = (k + 1) * group_;
    for (int64_t n = k * group_; n < end; n += block_heads_) {
      const int64_t heads = std::min(block_heads_, end - n);
      for (int64_t i = rows.begin; i < rows.end; i += block_rows_) {
        row_block({n, heads, {i, std::min(i + block_rows_, rows.end)}}, part, s);
      }
    }
    if (parts_ > 1) return;
    for (int64_t j = 0; j < call_.S; ++j) {
      const bool seen = keys.begin <= j && j < keys.end;
      const int64_t at = seen ? j - part.origin : -1;
      store_key_value(b, j, k, at < 0 ? nullptr : part.d_key + at * head_columns_,
                      at < 0 ? nullptr : part.d_value + at * value_columns_, s.rows.get());
    }
  }

  // dK and dV of a key; null where no row sees it. `zeros` is scratch.
  void store_key_value(int64_t b, int64_t j, int64_t k, const float* d_key, const float* d_value,
                       float* zeros) const {
    const int64_t index = (b * call_.S + j) * call_.K + k;
    if (!d_key) std::fill(zeros, zeros + std::max(call_.H, call_.V), 0.0f);
    store_row<Isa>(call_.d_key, index * call_.H, d_key ? d_key : zeros, call_.H, call_.scale);
    store_row<Isa>(call_.d_value, index * call_.V, d_key ? d_value : zeros, call_.V, 1.0f);
  }

  void sum_parts(int64_t head, Range keys) const {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Visibility visibility(call_, b);
    Buffer<float> zeros(std::max(call_.H, call_.V) + W);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      float *d_key = nullptr, *d_value = nullptr;
      for (int64_t p = 0; p < parts_; ++p) {
        const Range seen = visibility.of_rows(part_range(p));
        if (j < seen.begin || j >= seen.end) continue;
        const int64_t at = (head * parts_ + p) * part_keys_ + j - origin_of(seen);
        float* x = d_key_parts_.get() + at * head_columns_;
        float* y = d_value_parts_.get() + at * value_columns_;
        if (d_key) {
          add_row(d_key, x, head_columns_);
          add_row(d_value, y, value_columns_);
        } else {
          d_key = x;
          d_value = y;
        }
      }
      store_key_value(b, j, k, d_key, d_value, zeros.get());
    }
  }

  static void add_row(float* sum, const float* x, int64_t n) {
    for (int64_t h = 0; h < n; h += W) {
      Isa::store(sum + h, Isa::add(Isa::load(sum + h), Isa::load(x + h)));
    }
  }

  void row_block(const Block& block, Part& part, Scratch& s) const {
    const int64_t count = block.count(), padded = round_up(count, kGroupRows);
    float* dq = s.d_query.get();
    std::fill(dq, dq + padded * head_columns_, 0.0f);
    const Range keys = part.visibility.of_rows(block.queries);
    if (!keys.empty()) {
      load_queries(part.b, block, s);
      load_keys_to(keys.end, part, s);
      std::fill(s.weighted.get(), s.weighted.get() + padded * W, 0.0f);
      std::fill(s.total.get(), s.total.get() + padded * W, 0.0f);
      std::fill(s.row_sum.get(), s.row_sum.get() + padded, 0.0f);
      const int64_t first = (keys.begin - part.origin) / tile_keys_;
      const int64_t last = ceil_div(keys.end - part.origin, tile_keys_);
      for (int64_t t = first; output_is_exact_ && t < last; ++t) {
        probabilities(block, part, t, 0, s);
        gradients(count, part, t, 0, s);
      }
      if (!output_is_exact_) whole_rows(block, part, {first, last}, s);
      add_key_center(part.b, part.k, count, dq, s);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = part.b * call_.T + block.query_of(r);
      store_row<Isa>(call_.d_query, (token * call_.N + block.head_of(r)) * call_.H,
                     dq + r * head_columns_, call_.H, call_.scale);
    }
  }

  // The gradients of tiles of keys, after D of the rows is found from all of them.
  void whole_rows(const Block& block, const Part& part, Range tiles, Scratch& s) const {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      probabilities(block, part, t, t - tiles.begin, s);
    }
    for (int64_t r = 0; r < block.count(); ++r) {
      const float total = Isa::reduce_add(Isa::load(s.total.get() + r * W));
      if (total == 0.0f) continue;
      // Codes' probabilities may not sum to 1 exactly.
      s.statistics[r].delta += Isa::reduce_add(Isa::load(s.weighted.get() + r * W)) / total;
    }
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      gradients(block.count(), part, t, t - tiles.begin, s);
    }
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
      if (output_is_exact_)
        touch_rows(call_.out, b, block.queries.begin, block.queries.end, block.n, V);
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
          statistics = rows_.statistics(b, i, n, q);
          if (output_is_exact_ && !statistics.empty) {
            statistics.delta += rows_.output_delta(b, i, n, d, row);
          }
        }
        if (statistics.empty) {
          std::fill(q, q + H, 0.0f);
          std::fill(d, d + V, 0.0f);
        }
        const float* d_row[1] = {d};
        pack_value_line<Core, float>(d_row, V, s.d_out_panels.get() + (t + r) * C, block_rows_ * C);
        const float* q_row[1] = {q};
        if (!all_finite<Isa>(q, H)) {
          std::memcpy(row, q, static_cast<size_t>(H) * sizeof(float));
          replace_nonfinite(row, H);
          q_row[0] = row;
        }
        pack_value_line<Core, float>(q_row, H, s.query_panels.get() + (t + r) * C, block_rows_ * C);
        scale_row<Isa>(q, H, call_.scale * kLog2E);
      }
      interleave<R>(query, H, H, s.query_tiles.get() + t * H);
      interleave<R>(d_out, V, V, s.d_out_tiles.get() + t * V);
    }
  }

  // Packs the part's keys before `end`, and some blocks beyond, block by block.
  void load_keys_to(int64_t end, Part& part, Scratch& s) const {
    if (part.packed >= end) return;
    const int64_t last = std::min(part.keys.end, round_up(end - part.origin, block_keys_) +
                                                     part.origin + ahead_ - block_keys_);
    for (; part.packed < last; part.packed += block_keys_) {
      load_keys(part, {part.packed, std::min(part.packed + block_keys_, part.keys.end)}, s);
    }
  }

  void load_keys(const Part& part, Range keys, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V, place = keys.begin - part.origin;
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
      interleave<C>(key, H, H, s.key_scores.get() + (place + j0) * H);
      interleave<C>(value, V, V, s.value_scores.get() + (place + j0) * V);
      for (int64_t c = 0; c < C; ++c) {
        float* x = key + c * H;
        if (!all_finite<Isa>(x, H)) replace_nonfinite(x, H);
        const float* row[1] = {x};
        pack_value_line<Core, float>(row, H, s.key_panels.get() + (place + j0 + c) * C,
                                     part_keys_ * C);
      }
    }
  }

  // Where row r of a block's tile stands.
  int64_t place_of(int64_t tile, int64_t r) const {
    return (tile * block_rows_ + r) * kMaxTileKeys;
  }
  Range& columns_of(int64_t tile, int64_t g, Scratch& s) const {
    return s.columns[tile * (block_rows_ / kGroupRows) + g / kGroupRows];
  }

  // P and dP of a block of rows and tile t of the part's keys, kept as tile `kept`.
  void probabilities(const Block& block, const Part& part, int64_t t, int64_t kept,
                     Scratch& s) const {
    const int64_t packed = t * tile_keys_, key0 = part.origin + packed;
    const Rules rules(call_, part.b, block.n);
    for (int64_t g = 0; g < block.count(); g += kGroupRows) {
      const Range queries = block.queries_of(g);
      const Range seen = intersect(part.visibility.of_rows(queries), {key0, key0 + tile_keys_});
      Range& columns = columns_of(kept, g, s);
      columns = {};
      if (seen.empty() || (block.heads == 1 && !rules.any_visible(queries, seen))) continue;
      columns = {(seen.begin - key0) / C * C, round_up(seen.end - key0, C)};
      const Range padded{key0 + columns.begin, key0 + columns.end};
      if (kGluon && !rules.any() && sees_all(block, part.visibility, g, padded, s)) {
        multiply_subtiles(g, columns, packed, kept, s);
      } else {
        multiply_keys(g, columns, packed, kept, s);
        softmax(block, part, g, columns, key0, kept, s);
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
    // Ends of what rows see never decrease but to those that see nothing, which come last.
    const Range queries = block.queries_of(g);
    return contains(visibility.of_row(queries.begin), keys) &&
           contains(visibility.of_row(queries.end - 1), keys);
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
        const int64_t at = place_of(kept, t) + j;
        float* p = s.scores.get() + at;
        backward_tile<Core, false>(s.query_tiles.get() + t * H,
                                   s.key_scores.get() + (packed + j) * H, H, statistics, nullptr, p,
                                   kMaxTileKeys, s.total.get() + t * W);
        backward_tile<Core, true>(
            s.d_out_tiles.get() + t * V, s.value_scores.get() + (packed + j) * V, V, statistics, p,
            s.d_probability.get() + at, kMaxTileKeys, s.weighted.get() + t * W);
      }
    }
  }

  // S and dP of a group.
  void multiply_keys(int64_t g, Range columns, int64_t packed, int64_t kept, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      for (int64_t t = g; t < g + kGroupRows; t += R) {
        const int64_t at = place_of(kept, t) + j;
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
    for (int64_t r = g; r < g + kGroupRows; ++r) {
      const int64_t i = block.query_of(r), at = place_of(kept, r);
      const Range visible = r < block.count() ? part.visibility.of_row(i) : Range{};
      if (visible.empty() || s.statistics[r].empty) {
        zero_row(s, at, columns.begin, columns.end);
        continue;
      }
      const Rules rules(call_, part.b, block.head_of(r));
      probability_row<Isa>(rules, s.statistics[r], i, key0, columns.begin, columns.end, visible,
                           s.scores.get() + at, s.d_probability.get() + at, slope_of(s, at),
                           s.weighted.get() + r * W, s.total.get() + r * W);
    }
  }

  float* slope_of(Scratch& s, int64_t at) const {
    return call_.soft_cap != 0.0f ? s.cap_slope.get() + at : nullptr;
  }

  // From P and dP of a tile: dS, and its share of dQ, dK and dV.
  void gradients(int64_t rows, const Part& part, int64_t t, int64_t kept, Scratch& s) const {
    const int64_t packed = t * tile_keys_, groups = round_up(rows, kGroupRows);
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
        const int64_t at = place_of(kept, r);
        if (columns.empty()) {
          zero_row(s, at, seen.begin, seen.end);
          continue;
        }
        zero_row(s, at, seen.begin, columns.begin);
        zero_row(s, at, columns.end, seen.end);
        s.row_sum[r] +=
            gradient_row<Isa>(s.statistics[r].delta, columns.begin, columns.end,
                              s.scores.get() + at, slope_of(s, at), s.d_probability.get() + at);
      }
      if (!columns.empty()) accumulate_d_query(g, columns, packed, kept, s);
    }
    const int64_t depth = used.end - used.begin;
    for (int64_t j = seen.begin; j < seen.end; j += R) {
      const int64_t at = place_of(kept, used.begin) + j;
      float* dv = part.d_value + (packed + j) * value_columns_;
      float* dk = part.d_key + (packed + j) * head_columns_;
      for (int64_t c = 0; c < value_columns_; c += C) {
        transposed_tile<Isa, kMaxTileKeys>(s.scores.get() + at,
                                           s.d_out_panels.get() + c * block_rows_ + used.begin * C,
                                           depth, dv + c, value_columns_);
      }
      for (int64_t c = 0; c < head_columns_; c += C) {
        transposed_tile<Isa, kMaxTileKeys>(s.d_probability.get() + at,
                                           s.query_panels.get() + c * block_rows_ + used.begin * C,
                                           depth, dk + c, head_columns_);
      }
    }
  }

  static void zero_row(Scratch& s, int64_t at, int64_t begin, int64_t end) {
    if (begin >= end) return;
    std::fill(s.scores.get() + at + begin, s.scores.get() + at + end, 0.0f);
    std::fill(s.d_probability.get() + at + begin, s.d_probability.get() + at + end, 0.0f);
  }

  void accumulate_d_query(int64_t g, Range columns, int64_t packed, int64_t kept,
                          Scratch& s) const {
    static constexpr float kOne[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static_assert(R <= 16);
    const float* keys = s.key_panels.get() + (packed + columns.begin) * C;
    for (int64_t t = g; t < g + kGroupRows; t += R) {
      const float* ds = s.d_probability.get() + place_of(kept, t) + columns.begin;
      for (int64_t c = 0; c < head_columns_; c += C) {
        value_tile<Core, kMaxTileKeys>(ds, keys + c * part_keys_, columns.end - columns.begin,
                                       s.d_query.get() + t * head_columns_ + c, head_columns_,
                                       kOne);
      }
    }
  }

  // dQ = dS (K + center): the center's part is rowsum(dS) * center.
  void add_key_center(int64_t b, int64_t k, int64_t rows, float* dq, Scratch& s) const {
    if (!s.needs_row_sum) return;
    const float* center = rows_.key_center(b, k);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < call_.H; ++h) dq[r * head_columns_ + h] += s.row_sum[r] * center[h];
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  Rows rows_;
  const bool output_is_exact_;
  const int64_t group_, head_columns_, value_columns_;
  const int64_t tile_keys_, block_keys_, stages_, ahead_;
  int64_t block_heads_ = 1, block_rows_ = 0, part_rows_ = 0, parts_ = 1, part_keys_ = 0,
          block_tiles_ = 0;
  Buffer<float> d_key_parts_, d_value_parts_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
