// Gradient of the bias: dBias = dS, summed over the axes that the bias broadcasts. A task owns a
// block of the bias and walks everything that is summed into it, in a fixed order.
#pragma once

#include <algorithm>

#include "cpu/backward/backward_rows.h"
#include "cpu/rows/dropout_row.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class AttentionBackwardBias {
  using Core = F32Core<Isa>;
  static constexpr int64_t R = Core::kTileRows, C = Core::kTileColumns, W = Isa::kLanes;
  static constexpr int64_t kRows = 96, kKeys = 192;
  static_assert(kRows % R == 0 && kKeys % C == 0);
  using Rules = LogitRules<Isa, kKeys>;
  using Rows = BackwardRows<Isa, AttentionBackwardBiasCall>;

 public:
  AttentionBackwardBias(const AttentionBackwardBiasCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        rows_(call),
        row_blocks_(call.t == 1 ? 1 : ceil_div(call.T, kRows)),
        tiles_(ceil_div(call.S, kKeys) + 1),
        mask_tiles_(call),
        scratch_(parallel.threads()) {}

  void run() {
    rows_.find_centers(parallel_);
    mask_tiles_.find(parallel_);
    const int64_t tasks = call_.L * call_.b * call_.n * row_blocks_;
    parallel_.run(tasks, [this](int64_t task) { differentiate(task); });
  }

 private:
  struct Scratch {
    Buffer<float> sum;  // [kRows or 1][s]
    Buffer<float> query_tiles, d_out_tiles, key_scores, value_scores;
    // [tiles][kRows][kKeys]; cap_slope only under a soft cap
    Buffer<float> scores, d_probability, cap_slope;
    Buffer<float> rows, weighted, total;  // the last two: [kRows][W]
    Buffer<typename Rows::Statistics> statistics;
  };

  void prepare(Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    s.sum.allocate((call_.t == 1 ? 1 : kRows) * call_.s);
    s.query_tiles.allocate(kRows * H);
    s.d_out_tiles.allocate(kRows * V);
    s.key_scores.allocate(kKeys * H);
    s.value_scores.allocate(kKeys * V);
    s.scores.allocate(tiles_ * kRows * kKeys);
    s.d_probability.allocate(tiles_ * kRows * kKeys);
    if (call_.soft_cap != 0.0f) s.cap_slope.allocate(tiles_ * kRows * kKeys);
    s.weighted.allocate(kRows * W);
    s.total.allocate(kRows * W);
    s.rows.allocate((2 * std::max(R, C) + 1) * (std::max(H, V) + Isa::kLanes));
    s.statistics.allocate(kRows);
  }

  void differentiate(int64_t task) {
    const int64_t row_block = task % row_blocks_, lbn = task / row_blocks_;
    const int64_t n_bias = lbn % call_.n, b_bias = lbn / call_.n % call_.b;
    const int64_t l = lbn / (call_.n * call_.b), batch = call_.B / std::max<int64_t>(call_.L, 1);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    const Range rows = call_.t == 1
                           ? Range{0, call_.T}
                           : Range{row_block * kRows, std::min(call_.T, (row_block + 1) * kRows)};
    const int64_t sums = call_.t == 1 ? 1 : rows.end - rows.begin;
    std::fill(s.sum.get(), s.sum.get() + sums * call_.s, 0.0f);
    const Range batches = call_.b == 1 ? Range{0, batch} : Range{b_bias, b_bias + 1};
    const Range heads = call_.n == 1 ? Range{0, call_.N} : Range{n_bias, n_bias + 1};
    for (int64_t b = batches.begin; b < batches.end; ++b) {
      for (int64_t n = heads.begin; n < heads.end; ++n) {
        for (int64_t i0 = rows.begin; i0 < rows.end; i0 += kRows) {
          add_rows(l * batch + b, n, {i0, std::min(i0 + kRows, rows.end)}, s);
        }
      }
    }
    for (int64_t r = 0; r < sums; ++r) {
      const int64_t i = call_.t == 1 ? 0 : rows.begin + r;
      const int64_t index = (((l * call_.b + b_bias) * call_.n + n_bias) * call_.t + i) * call_.s;
      store_row<Isa>(call_.d_bias, index, s.sum.get() + r * call_.s, call_.s, 1.0f);
    }
  }

  void add_rows(int64_t b, int64_t n, Range rows, Scratch& s) const {
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n, mask_tiles_.plane(b, n));
    const DropoutRow<Isa> dropout(call_, b, n);
    const Range keys = visibility.of_rows(rows);
    if (keys.empty()) return;
    load_queries(b, n, rows, s);
    std::fill(s.weighted.get(), s.weighted.get() + kRows * W, 0.0f);
    std::fill(s.total.get(), s.total.get() + kRows * W, 0.0f);
    const int64_t first = keys.begin / C * C;
    // Calls body(keys, tile) for the tiles that any of the rows sees.
    const auto each_tile = [&](const auto& body) {
      for (int64_t key0 = first; key0 < keys.end; key0 += kKeys) {
        const Range block{key0, std::min(key0 + kKeys, call_.S)};
        if (!rules.seen(rows, intersect(keys, block)).empty()) body(block, (key0 - first) / kKeys);
      }
    };
    each_tile([&](Range block, int64_t tile) {
      load_keys(b, n / (call_.N / call_.K), block, s);
      probabilities(visibility, rules, dropout, rows, block, tile, s);
    });
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      s.statistics[r].take_sums(Isa::reduce_add(Isa::load(s.weighted.get() + r * W)),
                                Isa::reduce_add(Isa::load(s.total.get() + r * W)));
    }
    each_tile([&](Range block, int64_t tile) { add_gradients(visibility, rows, block, tile, s); });
  }

  void load_queries(int64_t b, int64_t n, Range rows, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    float* query = s.rows.get();
    float* d_out = query + R * H;
    for (int64_t t = 0; t < round_up(rows.end - rows.begin, R); t += R) {
      for (int64_t r = 0; r < R; ++r) {
        const int64_t i = rows.begin + t + r;
        float* q = query + r * H;
        float* d = d_out + r * V;
        s.statistics[t + r] = {};
        if (i < rows.end) {
          rows_.query(b, i, n, q);
          rows_.d_out(b, i, n, d);
          s.statistics[t + r] = rows_.statistics(b, i, n, q, d);
          scale_row<Isa>(q, H, call_.scale * kLog2E);
        } else {
          std::fill(q, q + H, 0.0f);
          std::fill(d, d + V, 0.0f);
        }
      }
      interleave<Isa, R>(query, H, H, s.query_tiles.get() + t * H);
      interleave<Isa, R>(d_out, V, V, s.d_out_tiles.get() + t * V);
    }
  }

  void load_keys(int64_t b, int64_t k, Range keys, Scratch& s) const {
    const int64_t H = call_.H, V = call_.V;
    float* row = s.rows.get();
    float* value = row + C * H;
    for (int64_t j0 = 0; j0 < round_up(keys.end - keys.begin, C); j0 += C) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t j = keys.begin + j0 + c;
        if (j < keys.end) {
          rows_.key(b, j, k, row + c * H);
          rows_.value(b, j, k, value + c * V);
        } else {
          std::fill(row + c * H, row + (c + 1) * H, 0.0f);
          std::fill(value + c * V, value + (c + 1) * V, 0.0f);
        }
      }
      interleave<Isa, C>(row, H, H, s.key_scores.get() + j0 * H);
      interleave<Isa, C>(value, V, V, s.value_scores.get() + j0 * V);
    }
  }

  // Row r of a tile.
  TileRow tile_row(int64_t tile, int64_t r, Range columns, Scratch& s) const {
    const int64_t offset = row_offset(tile, r);
    TileRow row;
    row.columns = columns;
    row.p = s.scores.get() + offset;
    row.d_p = s.d_probability.get() + offset;
    if (call_.soft_cap != 0.0f) row.cap_slope = s.cap_slope.get() + offset;
    return row;
  }
  static int64_t row_offset(int64_t tile, int64_t r) { return (tile * kRows + r) * kKeys; }

  // P and dP of a tile, and its share of the row sums.
  void probabilities(const Visibility& visibility, const Rules& rules,
                     const DropoutRow<Isa>& dropout, Range rows, Range keys, int64_t tile,
                     Scratch& s) const {
    const int64_t columns = round_up(keys.end - keys.begin, C);
    for (int64_t t = 0; t < round_up(rows.end - rows.begin, R); t += R) {
      for (int64_t j = 0; j < columns; j += C) {
        const int64_t at = row_offset(tile, t) + j;
        score_tile<Core>(s.query_tiles.get() + t * call_.H, s.key_scores.get() + j * call_.H,
                         call_.H, s.scores.get() + at, kKeys);
        score_tile<Core>(s.d_out_tiles.get() + t * call_.V, s.value_scores.get() + j * call_.V,
                         call_.V, s.d_probability.get() + at, kKeys);
      }
    }
    uint8_t scratch[DropoutRow<Isa>::bytes(kKeys)];
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      TileRow row = tile_row(tile, r, {0, columns}, s);
      row.query = rows.begin + r;
      row.key0 = keys.begin;
      row.visible = visibility.of_row(row.query);
      if (row.visible.empty() || s.statistics[r].empty) continue;
      if (dropout.any()) {
        const int64_t end = keys.begin + columns;
        drop_gradient<Isa>(dropout.find(row.query, keys.begin, end, scratch), dropout.scale(), row);
      }
      probability_row<Isa>(rules, s.statistics[r], row, s.weighted.get() + r * W,
                           s.total.get() + r * W);
    }
  }

  void add_gradients(const Visibility& visibility, Range rows, Range keys, int64_t tile,
                     Scratch& s) const {
    const int64_t columns = round_up(keys.end - keys.begin, C);
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      if (visibility.of_row(rows.begin + r).empty() || s.statistics[r].empty) continue;
      const TileRow row = tile_row(tile, r, {0, columns}, s);
      const float total = gradient_row<Isa>(s.statistics[r], row);
      float* sum = s.sum.get() + (call_.t == 1 ? 0 : r) * call_.s;
      if (call_.s == 1) {
        sum[0] += total;
      } else {
        for (int64_t j = 0; j < keys.end - keys.begin; ++j) sum[keys.begin + j] += row.d_p[j];
      }
    }
  }

  const AttentionBackwardBiasCall& call_;
  Parallel& parallel_;
  Rows rows_;
  const int64_t row_blocks_, tiles_;
  MaskTiles mask_tiles_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
