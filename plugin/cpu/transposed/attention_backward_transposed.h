// Flash attention backward on matrix tiles, transposed: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO,
// dK += dS^T Q, dQ^T += K^T dS^T. For each block of rows one pass over the keys finds D, another
// all gradients: S and dP are made twice, which takes less than to keep them outside of L1.
#pragma once

#include <algorithm>

#include "cpu/backward/backward_tasks.h"
#include "cpu/rows/mask_tiles.h"
#include "cpu/transposed/attention_forward_transposed.h"
#include "cpu/transposed/tile_quad.h"
#include "cpu/transposed/transposed_gradients.h"

namespace jax_gluon::cpu {
namespace {

struct TransposedBlocks {
  // Rows of a block: sums of dK and dV are loaded and stored for so many.
  static constexpr int64_t kRows = 128, kPairs = kRows / kPairQueries;
  static constexpr int64_t kColumnStep = kUnitKeys;
  // Units of a step, at most: sums of dQ are loaded and stored for its keys.
  static constexpr int64_t kMaxUnits = 8;

  explicit TransposedBlocks(const AttentionBackwardCall& call)
      : parts(call),
        units(std::min(std::max<int64_t>(ceil_div(call.cpu_kernel.block_k, kUnitKeys), 1),
                       kMaxUnits)),
        head_columns(round_up(call.H, kUnitKeys)),
        value_columns(round_up(call.V, kUnitKeys)) {
    parts.set_block_rows(kRows);
    // Keys are counted from the first of a unit.
    part_keys = round_up(parts.max_seen().by_part, kUnitKeys) + kUnitKeys;
  }

  static int64_t first_key(Range keys) { return keys.begin / kUnitKeys * kUnitKeys; }

  BackwardParts parts;
  const int64_t units;  // of a step
  const int64_t head_columns, value_columns;
  int64_t part_keys;  // that a part sees, at most
};

// kCodes: operands have scales beside their rows.
template <class Core, bool kCodes>
class AttentionBackwardTransposed {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  using Blocks = TransposedBlocks;
  using Part = BackwardPart;
  using Operands = TransposedBackwardOperands<Core>;
  using Gradients = TransposedGradients<Core, kCodes>;
  using Pair = BackwardPair<Core>;
  using Rules = typename Pair::Rules;
  using Bf16 = TransposedBf16Core<Isa>;
  static constexpr int W = kTileQueries;
  static constexpr int64_t kTile = W * W;  // lanes of a tile
  static constexpr int64_t kTileBytes = 4 * kTile;
  static constexpr int64_t kProducts = 2 * kUnitKeys * W;  // floats of a unit and pair

 public:
  // Of calls that the forward pass takes: INT8 products where each row of queries and of keys has
  // one scale.
  static bool takes(const AttentionBackwardCall& call) {
    if (!kCodes) return AttentionForwardTransposed<Core, Kernel::kBaseline>::takes(call);
    const bool is_int8 =
        call.query.quantization.head_block == 0 && call.key.quantization.head_block == 0;
    return AttentionForwardTransposed<TransposedInt8Core<Isa>, Kernel::kBaseline>::takes(call) &&
           is_int8 == (Core::kArithmetic == Arithmetic::kInt8);
  }
  static KernelOffer offer() {
    constexpr int64_t kMax = Blocks::kMaxUnits * kUnitKeys;
    return {Kernel::kBaseline,
            name_of(Arithmetic::kBf16),
            {},
            {64, kUnitKeys, kMax, kUnitKeys},
            {},
            {}};
  }

  AttentionBackwardTransposed(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        blocks_(call),
        operands_(call),
        gradients_(call),
        tasks_(call, parallel, blocks_),
        mask_tiles_(call),
        scratch_(parallel.threads()) {}

  void describe(KernelRun& run) const { run.block_k = blocks_.units * kUnitKeys; }

  void run() {
    if (call_.B * call_.N == 0) return;
    operands_.find_centers(parallel_);
    mask_tiles_.find(parallel_);
    tasks_.run([this](const Part& part, Range rows) { differentiate(part, rows); });
  }

 private:
  struct Scratch {
    typename Operands::Scratch load;
    BackwardKeys keys;
    typename Operands::Queries queries;
    Buffer<float> scores, d_probability, cap_slope, kept;  // of a unit and pair
    Buffer<uint32_t> probabilities, d_scores;              // [pairs][kUnitKeys][16], of a unit
    Buffer<uint32_t> d_score_pairs;                        // [pairs][units of a step][2][16][16]
    Buffer<float> d_query;                                 // [pairs][head columns / 16][2][16][16]
    Buffer<float> weighted, total, row_sum;                // of each row
    Buffer<float> results;                                 // [16][head columns]
  };
  // Rows of a query head that are computed together.
  struct Block {
    const Part& part;
    int64_t n;
    Range rows;
    const Rules& rules;
    const DropoutRow<Isa>& dropout;
  };

  void prepare(const Part& part, Scratch& s) const {
    const int64_t keys =
        part.keys.empty() ? 0 : round_up(part.keys.end - part.first_key, kUnitKeys);
    operands_.prepare(keys, Blocks::kRows, s.load, s.keys, s.queries);
    s.scores.allocate(kProducts);
    s.d_probability.allocate(kProducts);
    if (call_.soft_cap != 0.0f) s.cap_slope.allocate(kProducts);
    if (call_.dropout) s.kept.allocate(kProducts);
    s.probabilities.allocate(Blocks::kPairs * kUnitKeys * W);
    s.d_scores.allocate(Blocks::kPairs * kUnitKeys * W);
    s.d_score_pairs.allocate(Blocks::kPairs * blocks_.units * 2 * kTile);
    s.d_query.allocate(Blocks::kRows * blocks_.head_columns);
    for (Buffer<float>* x : {&s.weighted, &s.total, &s.row_sum}) x->allocate(Blocks::kRows);
    s.results.allocate(W * blocks_.head_columns);
  }

  void differentiate(const Part& part, Range rows) {
    const typename Isa::Tiles tiles;
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(part, s);
    if (!part.keys.empty()) operands_.load_keys(part, s.load, s.keys);
    const int64_t group = call_.N / call_.K;
    for (int64_t n = part.k * group; n < (part.k + 1) * group; ++n) {
      const Rules rules(call_, part.b, n, mask_tiles_.plane(part.b, n));
      const DropoutRow<Isa> dropout(call_, part.b, n);
      for (int64_t i = rows.begin; i < rows.end; i += Blocks::kRows) {
        const Range block{i, std::min(i + Blocks::kRows, rows.end)};
        const Block at{part, n, block, rules, dropout};
        row_block(at, s);
      }
    }
  }

  void row_block(const Block& block, Scratch& s) const {
    const Part& part = block.part;
    const int64_t count = block.rows.end - block.rows.begin;
    const Range keys = part.visibility.of_rows(block.rows);
    std::fill(s.d_query.get(), s.d_query.get() + Blocks::kRows * blocks_.head_columns, 0.0f);
    std::fill(s.row_sum.get(), s.row_sum.get() + Blocks::kRows, 0.0f);
    if (!keys.empty()) {
      operands_.load_queries(part.b, block.n, block.rows, s.load, s.queries);
      const Range units{(keys.begin - part.first_key) / kUnitKeys,
                        ceil_div(keys.end - part.first_key, kUnitKeys)};
      find_means(block, units, s);
      for (int64_t unit = units.begin; unit < units.end; unit += blocks_.units) {
        add_gradients(block, {unit, std::min(unit + blocks_.units, units.end)}, s);
      }
    }
    for (int64_t r = 0; r < count; r += W) store_d_query(block, r, s);
  }

  Pair pair_of(const Block& block, int64_t p, const Scratch& s) const {
    const int64_t first = p * kPairQueries;
    const Range rows{block.rows.begin + first,
                     std::min(block.rows.begin + first + kPairQueries, block.rows.end)};
    bool is_whole = rows.end - rows.begin == kPairQueries;
    for (int64_t r = 0; is_whole && r < kPairQueries; ++r) {
      is_whole = !s.queries.statistics[first + r].empty;
    }
    return {block.part.visibility, block.rules, block.dropout, s.queries, rows, first, is_whole};
  }
  static int64_t pairs_of(const Block& block) {
    return ceil_div(block.rows.end - block.rows.begin, kPairQueries);
  }
  bool sees(const Pair& pair, int64_t key0) const {
    const Range keys = intersect(pair.visibility.of_rows(pair.rows), {key0, key0 + kUnitKeys});
    return !pair.rules.seen(pair.rows, keys).empty();
  }

  // S and dP of a unit and a pair.
  BackwardUnit multiply(const Pair& pair, int64_t unit, Scratch& s) const {
    const int64_t key = unit * kUnitKeys, lanes = operands_.lanes();
    const int64_t value_lanes = blocks_.value_columns / 2;
    const auto product = [&](float* sums) {
      return QuadSums{sums, kTileBytes, kUnitKeys / W * kTileBytes};
    };
    const auto left = [](const uint32_t* first, int64_t row) {
      return QuadOperand{first, 4 * W * row, Isa::kTileStride, 4 * row};
    };
    const auto right = [](const uint32_t* first, int64_t row) {
      return QuadOperand{first, 4 * W * row, kTileBytes};
    };
    multiply_quad<Core, false>(left(s.keys.keys.get() + key * lanes, lanes),
                               right(s.queries.query.get() + pair.first * lanes, lanes), lanes / W,
                               product(s.scores.get()));
    multiply_quad<Bf16, false>(left(s.keys.values.get() + key * value_lanes, value_lanes),
                               right(s.queries.d_out.get() + pair.first * value_lanes, value_lanes),
                               value_lanes / W, product(s.d_probability.get()));
    return {s.scores.get(),
            s.d_probability.get(),
            s.cap_slope.get(),
            s.kept.get(),
            s.keys.scale.get() + key,
            s.keys.value_scale.get() + key,
            s.keys.gradient_scale.get() + key};
  }

  // D of all rows.
  void find_means(const Block& block, Range units, Scratch& s) const {
    std::fill(s.weighted.get(), s.weighted.get() + Blocks::kRows, 0.0f);
    std::fill(s.total.get(), s.total.get() + Blocks::kRows, 0.0f);
    for (int64_t p = 0; p < pairs_of(block); ++p) {
      const Pair pair = pair_of(block, p, s);
      float *weighted = s.weighted.get() + pair.first, *total = s.total.get() + pair.first;
      for (int64_t u = units.begin; u < units.end; ++u) {
        const int64_t key0 = block.part.first_key + u * kUnitKeys;
        if (!sees(pair, key0)) continue;
        const BackwardUnit unit = multiply(pair, u, s);
        if (gradients_.edit(pair, key0, unit)) {
          gradients_.template add_means<true>(pair, unit, weighted, total);
        } else {
          gradients_.template add_means<false>(pair, unit, weighted, total);
        }
      }
      for (int64_t r = pair.first; r < pair.first + kPairQueries; ++r) {
        const auto& statistics = s.queries.statistics[r];
        s.queries.delta[r] = statistics.delta + statistics.mean(s.weighted[r], s.total[r]);
      }
    }
  }

  BackwardFactors factors(int64_t p, int64_t part, Scratch& s) const {
    return {s.probabilities.get() + p * kUnitKeys * W, s.d_scores.get() + p * kUnitKeys * W,
            s.d_score_pairs.get() + (p * blocks_.units + part) * 2 * kTile};
  }

  // What the units of a step add to dQ, dK and dV.
  void add_gradients(const Block& block, Range units, Scratch& s) const {
    const int64_t pairs = pairs_of(block);
    Range seen[Blocks::kPairs] = {};  // units that a pair sees, from the first to the last
    for (int64_t u = units.begin; u < units.end; ++u) {
      const int64_t key0 = block.part.first_key + u * kUnitKeys;
      Range used = {};  // pairs that see the unit, likewise
      for (int64_t p = 0; p < pairs; ++p) {
        const Pair pair = pair_of(block, p, s);
        const BackwardFactors out = factors(p, u - units.begin, s);
        if (!sees(pair, key0)) {
          std::fill(out.probabilities, out.probabilities + kUnitKeys * W, 0u);
          std::fill(out.d_scores, out.d_scores + kUnitKeys * W, 0u);
          std::fill(out.d_score_pairs, out.d_score_pairs + 2 * kTile, 0u);
          continue;
        }
        used = {used.empty() ? p : used.begin, p + 1};
        seen[p] = {seen[p].empty() ? u : seen[p].begin, u + 1};
        const BackwardUnit unit = multiply(pair, u, s);
        float* sums = s.row_sum.get() + pair.first;
        if (gradients_.edit(pair, key0, unit)) {
          gradients_.template find<true>(pair, unit, out, sums);
        } else {
          gradients_.template find<false>(pair, unit, out, sums);
        }
      }
      if (!used.empty()) add_d_key_value(block.part, u, used, s);
    }
    for (int64_t p = 0; p < pairs; ++p) {
      if (!seen[p].empty()) add_d_query(p, units, seen[p], s);
    }
  }

  // dV += P^T dO and dK += dS^T Q of a unit.
  void add_d_key_value(const Part& part, int64_t unit, Range pairs, Scratch& s) const {
    const auto add = [&](const uint32_t* left, const uint32_t* right, int64_t columns,
                         float* sums) {
      const QuadOperand rows{left + pairs.begin * kUnitKeys * W, kTileBytes, 2 * kTileBytes};
      for (int64_t c = 0; c < columns; c += 2 * W) {
        const uint32_t* first = right + (pairs.begin * columns + c) * W;
        multiply_quad<Bf16, true>(rows, {first, kTileBytes, 4 * columns * W},
                                  pairs.end - pairs.begin,
                                  {sums + c, 4 * W * columns, 4 * W, 4 * columns});
      }
    };
    const int64_t key = unit * kUnitKeys;
    add(s.probabilities.get(), s.queries.d_out_pairs.get(), blocks_.value_columns,
        part.d_value + key * blocks_.value_columns);
    add(s.d_scores.get(), s.queries.query_pairs.get(), blocks_.head_columns,
        part.d_key + key * blocks_.head_columns);
  }

  // dQ^T += K^T dS^T of a pair and the units `seen` of a step.
  void add_d_query(int64_t p, Range step, Range seen, Scratch& s) const {
    const int64_t columns = blocks_.head_columns;
    const BackwardFactors from = factors(p, seen.begin - step.begin, s);
    const QuadOperand right{from.d_score_pairs, kTileBytes, 2 * kTileBytes};
    for (int64_t h = 0; h < columns; h += 2 * W) {
      const uint32_t* keys = s.keys.key_columns.get() + (seen.begin * columns + h) * W;
      multiply_quad<Bf16, true>(
          {keys, kTileBytes, 4 * columns * W}, right, seen.end - seen.begin,
          {s.d_query.get() + (p * columns + h) * 2 * W, 2 * kTileBytes, kTileBytes});
    }
  }

  // Rows r to r + 16 of a block, of dQ = dS (K + center): the center's part is rowsum(dS) * center.
  void store_d_query(const Block& block, int64_t r, Scratch& s) const {
    const Part& part = block.part;
    const int64_t columns = blocks_.head_columns;
    const float* turned = s.d_query.get() + (r / kPairQueries * columns * 2 + r / W % 2 * W) * W;
    for (int64_t h = 0; h < columns; h += W) {
      TransposedPack<Isa>::turn(turned + 2 * h * W, W, s.results.get() + h, columns);
    }
    const auto& rows = operands_.rows();
    const float* center = rows.key_center_matters() ? rows.key_center(part.b, part.k) : nullptr;
    for (int64_t i = r; i < std::min(r + W, block.rows.end - block.rows.begin); ++i) {
      float* dq = s.results.get() + (i - r) * columns;
      for (int64_t h = 0; center && h < call_.H; ++h) dq[h] += s.row_sum[i] * center[h];
      store_row<Isa>(call_.d_query, call_.d_query.at(part.b, block.rows.begin + i, block.n), dq,
                     call_.H, call_.scale);
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  const Blocks blocks_;
  Operands operands_;
  const Gradients gradients_;
  BackwardTasks<Isa, Blocks> tasks_;
  MaskTiles mask_tiles_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
