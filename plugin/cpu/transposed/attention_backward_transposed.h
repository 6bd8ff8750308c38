// Flash attention backward in bfloat16, on matrix tiles or on vectors, transposed: S^T = K Q^T,
// dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T. For each block of rows one pass over
// the keys finds D, another all gradients. On tile registers S and dP are made twice, so that only
// those of a unit of keys are kept; vectors take longer to make them than to read P and dP again,
// as long as there is room. The baseline pipeline does one after the other; in the gluon pipeline
// the products of the next unit, and those of the unit before with P and dS, run between the steps
// of vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/backward/backward_tasks.h"
#include "cpu/rows/mask_tiles.h"
#include "cpu/transposed/attention_forward_transposed.h"
#include "cpu/transposed/tile_quad.h"
#include "cpu/transposed/transposed_gradients.h"
#include "cpu/transposed/vector_quad.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, Kernel kKernel>
struct TransposedBlocks {
  // Rows of a block: sums of dK and dV are loaded and stored for so many. The gluon pipeline keeps
  // P and dS of two units.
  static constexpr int64_t kRows = kKernel == Kernel::kGluon ? 64 : 128;
  static constexpr int64_t kPairs = kRows / kPairQueries;
  static constexpr int64_t kColumnStep = kUnitKeys;
  // Units of a step, at most: sums of dQ are loaded and stored for its keys.
  static constexpr int64_t kMaxUnits = 8;
  // Bytes of P and dP that are kept, at most, by each thread: those of 20,000 keys and 128 rows.
  static constexpr int64_t kMaxKeptBytes = 20 << 20;

  explicit TransposedBlocks(const AttentionBackwardCall& call)
      : parts(call),
        units(std::min(std::max<int64_t>(ceil_div(call.cpu_kernel.block_k, kUnitKeys), 1),
                       kMaxUnits)),
        head_columns(round_up(call.H, kUnitKeys)),
        value_columns(round_up(call.V, kUnitKeys)) {
    parts.set_block_rows(kRows);
    // Keys are counted from the first of a unit.
    part_keys = round_up(parts.max_seen().by_part, kUnitKeys) + kUnitKeys;
    keeps = !Isa::kHasTiles && part_keys * kRows * 8 <= kMaxKeptBytes;
  }

  static int64_t first_key(Range keys) { return keys.begin / kUnitKeys * kUnitKeys; }

  BackwardParts parts;
  const int64_t units;  // of a step
  const int64_t head_columns, value_columns;
  int64_t part_keys;  // that a part sees, at most
  bool keeps;         // P and dP of a block of rows
};

// kCodes: operands have scales beside their rows. `takes` refuses what forward on tiles
// does; no rule is refused.
template <class Core, bool kCodes, Kernel kKernel>
class AttentionBackwardTransposed {
  using Isa = typename Core::Isa;
  using Blocks = TransposedBlocks<Isa, kKernel>;
  using Part = BackwardPart;
  using Operands = TransposedBackwardOperands<Core>;
  using Gradients = TransposedGradients<Core, kCodes>;
  using Pair = BackwardPair<Core>;
  using Rules = typename Pair::Rules;
  using Kind = TileQuad::Kind;
  using Work =
      QuadWork<std::conditional_t<Isa::kHasTiles, TileQuadSteps<Core>, VectorQuadSteps<Core>>>;
  static constexpr bool kPipelined = kKernel == Kernel::kGluon;
  // Products, P and dS of two units or steps, where one is made while the other is multiplied.
  static constexpr int64_t kCopies = kPipelined ? 2 : 1;
  static constexpr int W = kTileQueries;
  // Of fewer rows most lanes would be empty. (Tiles are faster even so.)
  static constexpr int64_t kMinRows = Isa::kHasTiles ? 1 : 20;
  static constexpr int64_t kTile = W * W;                  // lanes of a tile
  static constexpr int64_t kProducts = 2 * kUnitKeys * W;  // floats of a unit and pair

 public:
  // Of calls that the forward pass takes. On tiles, INT8 products where each row of queries and of
  // keys has one scale; codes are exact in bfloat16 too.
  static bool takes(const AttentionBackwardCall& call) {
    if (call.T < kMinRows) return false;
    if (!kCodes) return AttentionForwardTransposed<Core, Kernel::kBaseline>::takes(call);
    const bool is_int8 = Isa::kHasTiles && call.query.quantization.head_block == 0 &&
                         call.key.quantization.head_block == 0;
    return AttentionForwardTransposed<TransposedInt8Core<Isa>, Kernel::kBaseline>::takes(call) &&
           is_int8 == (Core::kArithmetic == Arithmetic::kInt8);
  }
  static KernelOffer offer() {
    constexpr int64_t kMax = Blocks::kMaxUnits * kUnitKeys;
    KernelOffer offer = {kKernel, name_of(Arithmetic::kBf16),
                         {},      {Isa::kHasTiles ? 64 : 128, kUnitKeys, kMax, kUnitKeys},
                         {},      {}};
    // Vectors of products and of P take turns in the same units of the processor.
    if (!Isa::kHasTiles && !kPipelined) offer.reason = "without tiles there is nothing to overlap";
    return offer;
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
    bool is_whole[Blocks::kPairs];
    Work work;
    // [slots][2][kUnitKeys][16], a slot for a unit and pair.
    Buffer<float> scores, d_probability, cap_slope, kept;
    Buffer<uint8_t> is_edited;                 // [slots]
    Buffer<uint32_t> probabilities, d_scores;  // [copies][pairs][kUnitKeys][16], of a unit
    Buffer<uint32_t> d_score_pairs;  // [copies][pairs][units of a step][2][16][16], of a step
    Buffer<TileQuad> gradients;      // products with P and dS that are still to be made
    int64_t gradients_begin, gradients_end;
    Buffer<float> d_query;                   // [pairs][head columns / 16][2][16][16]
    Buffer<float> weighted, total, row_sum;  // of each row
    Buffer<float> results;                   // [16][head columns]
  };
  // Rows of a query head that are computed together.
  struct Block {
    const Part& part;
    int64_t n;
    Range rows;
    const Rules& rules;
    const DropoutRow<Isa>& dropout;
    Range units;  // those of the part that its rows see

    int64_t pairs() const { return ceil_div(rows.end - rows.begin, kPairQueries); }
  };
  // A unit of keys and a pair that sees any of them, and where its products are.
  struct Item {
    int64_t unit, pair, copy;
  };

  void prepare(const Part& part, Scratch& s) const {
    const int64_t keys =
        part.keys.empty() ? 0 : round_up(part.keys.end - part.first_key, kUnitKeys);
    operands_.prepare(keys, Blocks::kRows, s.load, s.keys, s.queries);
    const int64_t slots = blocks_.keeps ? keys / kUnitKeys * Blocks::kPairs : kCopies;
    s.scores.allocate(slots * kProducts);
    s.d_probability.allocate(slots * kProducts);
    if (call_.soft_cap != 0.0f) s.cap_slope.allocate(slots * kProducts);
    if (call_.dropout) s.kept.allocate(slots * kProducts);
    s.is_edited.allocate(slots);
    s.probabilities.allocate(kCopies * Blocks::kPairs * kUnitKeys * W);
    s.d_scores.allocate(kCopies * Blocks::kPairs * kUnitKeys * W);
    s.d_score_pairs.allocate(kCopies * Blocks::kPairs * blocks_.units * 2 * kTile);
    s.gradients.allocate(((Blocks::kPairs + 1) * blocks_.head_columns + blocks_.value_columns) /
                         (2 * W));
    s.d_query.allocate(Blocks::kRows * blocks_.head_columns);
    for (Buffer<float>* x : {&s.weighted, &s.total, &s.row_sum}) x->allocate(Blocks::kRows);
    s.results.allocate(W * blocks_.head_columns);
  }

  void differentiate(const Part& part, Range rows) {
    [[maybe_unused]] const typename Isa::Tiles tiles;
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
        const Range keys = part.visibility.of_rows(block);
        Range units;
        if (!keys.empty()) {
          units = {(keys.begin - part.first_key) / kUnitKeys,
                   ceil_div(keys.end - part.first_key, kUnitKeys)};
        }
        row_block({part, n, block, rules, dropout, units}, s);
      }
    }
  }

  void row_block(const Block& block, Scratch& s) const {
    const Part& part = block.part;
    const int64_t count = block.rows.end - block.rows.begin;
    std::fill(s.d_query.get(), s.d_query.get() + Blocks::kRows * blocks_.head_columns, 0.0f);
    std::fill(s.row_sum.get(), s.row_sum.get() + Blocks::kRows, 0.0f);
    if (!block.units.empty()) {
      operands_.load_queries(part.b, block.n, block.rows, s.load, s.queries);
      for (int64_t p = 0; p < block.pairs(); ++p) s.is_whole[p] = is_whole(block, p, s);
      find_means(block, s);
      add_gradients(block, s);
    }
    for (int64_t r = 0; r < count; r += W) store_d_query(block, r, s);
  }

  // Whether all rows of a pair are there, and see keys.
  static bool is_whole(const Block& block, int64_t p, const Scratch& s) {
    const int64_t first = p * kPairQueries, end = first + kPairQueries;
    bool is_whole = end <= block.rows.end - block.rows.begin;
    for (int64_t r = first; is_whole && r < end; ++r) is_whole = !s.queries.statistics[r].empty;
    return is_whole;
  }
  Pair pair_of(const Block& block, int64_t p, const Scratch& s) const {
    const int64_t first = p * kPairQueries;
    const Range rows{block.rows.begin + first,
                     std::min(block.rows.begin + first + kPairQueries, block.rows.end)};
    return {block.part.visibility, block.rules, block.dropout, s.queries, rows, first,
            s.is_whole[p]};
  }
  static bool sees(const Pair& pair, int64_t key0) {
    const Range keys = intersect(pair.visibility.of_rows(pair.rows), {key0, key0 + kUnitKeys});
    return !pair.rules.seen(pair.rows, keys).empty();
  }
  // The first item from there on, pair by pair of each unit; of unit units.end where there is none.
  Item item_from(const Block& block, int64_t unit, int64_t p, int64_t copy,
                 const Scratch& s) const {
    for (; unit < block.units.end; ++unit, p = 0) {
      for (; p < block.pairs(); ++p) {
        if (sees(pair_of(block, p, s), block.part.first_key + unit * kUnitKeys)) {
          return {unit, p, copy};
        }
      }
    }
    return {block.units.end, 0, copy};
  }
  Item item_after(const Block& block, const Item& item, const Scratch& s) const {
    return item_from(block, item.unit, item.pair + 1, (item.copy + 1) % kCopies, s);
  }

  int64_t slot_of(const Item& item) const {
    return blocks_.keeps ? item.unit * Blocks::kPairs + item.pair : item.copy;
  }
  BackwardUnit unit_of(const Item& item, const Scratch& s) const {
    const int64_t key = item.unit * kUnitKeys, at = slot_of(item) * kProducts;
    return {s.scores.get() + at,
            s.d_probability.get() + at,
            call_.soft_cap != 0.0f ? s.cap_slope.get() + at : nullptr,
            call_.dropout ? s.kept.get() + at : nullptr,
            s.keys.scale.get() + key,
            s.keys.value_scale.get() + key,
            s.keys.gradient_scale.get() + key};
  }
  // Keys of a unit, and rows of a pair, that are there.
  static int64_t keys_of(const Part& part, int64_t unit) {
    return std::min<int64_t>(part.keys.end - part.first_key - unit * kUnitKeys, kUnitKeys);
  }
  static int64_t rows_of(const Block& block, int64_t p) {
    return std::min<int64_t>(block.rows.end - block.rows.begin - p * kPairQueries, kPairQueries);
  }

  // S and dP of an item, if it is one.
  void multiply(const Block& block, const Item& item, Scratch& s) const {
    if (item.unit == block.units.end) return;
    const int64_t lanes = operands_.lanes(), value_lanes = blocks_.value_columns / 2;
    const int64_t key = item.unit * kUnitKeys, row = item.pair * kPairQueries;
    const BackwardUnit unit = unit_of(item, s);
    const QuadExtent extent = {keys_of(block.part, item.unit), rows_of(block, item.pair)};
    const auto product = [&](Kind kind, const uint32_t* left, const uint32_t* right, int64_t width,
                             float* sums) {
      s.work.add({kind,
                  width / W,
                  {left + key * width, 4 * W * width, kTileStride, 4 * width},
                  {right + row * width, 4 * W * width, kTileBytes},
                  {sums, kTileBytes, kUnitKeys / W * kTileBytes},
                  extent});
    };
    product(Kind::kScores, s.keys.keys.get(), s.queries.query.get(), lanes, unit.scores);
    product(Kind::kProducts, s.keys.values.get(), s.queries.d_out.get(), value_lanes,
            unit.d_probability);
  }

  // use(item, next, slot) for each item of a block, whose products are there: made now, or before.
  template <class Use>
  void each_item(const Block& block, bool makes, Scratch& s, const Use& use) const {
    Item item = item_from(block, block.units.begin, 0, 0, s);
    if (makes) multiply(block, item, s);
    s.work.finish();
    while (item.unit < block.units.end) {
      const Item next = item_after(block, item, s);
      if (kPipelined && makes) multiply(block, next, s);
      use(item, next, [&](int64_t steps) {
        if (kPipelined) s.work.advance(steps);
      });
      if (!kPipelined && makes) multiply(block, next, s);
      s.work.finish();
      item = next;
    }
  }

  static int64_t first_key(const Block& block, const Item& item) {
    return block.part.first_key + item.unit * kUnitKeys;
  }
  // Calls body with both as constants.
  template <class Body>
  static void with(bool edited, bool keeps, const Body& body) {
    const auto with_keeps = [&](auto is_edited) {
      if constexpr (!Isa::kHasTiles) {
        if (keeps) return body(is_edited, std::true_type());
      }
      body(is_edited, std::false_type());
    };
    edited ? with_keeps(std::true_type()) : with_keeps(std::false_type());
  }

  // D of all rows.
  void find_means(const Block& block, Scratch& s) const {
    std::fill(s.weighted.get(), s.weighted.get() + Blocks::kRows, 0.0f);
    std::fill(s.total.get(), s.total.get() + Blocks::kRows, 0.0f);
    each_item(block, true, s, [&](const Item& item, const Item&, const auto& slot) {
      const Pair pair = pair_of(block, item.pair, s);
      const BackwardUnit unit = unit_of(item, s);
      float *weighted = s.weighted.get() + pair.first, *total = s.total.get() + pair.first;
      const bool is_edited = gradients_.edit(pair, first_key(block, item), unit);
      s.is_edited[slot_of(item)] = is_edited;
      with(is_edited, blocks_.keeps, [&](auto edited, auto keeps) {
        gradients_.template add_means<edited(), keeps()>(pair, unit, weighted, total, slot);
      });
    });
    for (int64_t r = 0; r < block.pairs() * kPairQueries; ++r) {
      auto& statistics = s.queries.statistics[r];
      statistics.take_sums(s.weighted[r], s.total[r]);
      s.queries.delta[r] = statistics.delta;
      // Less than P loses in bfloat16 is no factor: its last bits, which depend on how the sum was
      // made, would turn roundings.
      const bool is_one = std::fabs(statistics.factor - 1.0f) < 0x1p-10f;
      s.queries.probability_factor[r] = is_one ? 1.0f : statistics.factor;
    }
  }

  // Units of a step that is being made, and which of them each pair sees; pairs that see the unit.
  struct Step {
    int64_t first;  // unit
    int64_t copy = 0, unit_copy = 0;
    uint32_t units[Blocks::kPairs] = {}, pairs = 0;  // bits
  };
  static Range range_of(uint32_t bits) { return {__builtin_ctz(bits), 32 - __builtin_clz(bits)}; }
  static bool has(uint32_t bits, int64_t i) { return (bits >> i & 1) != 0; }

  // P and dS of a pair and a unit.
  BackwardFactors factors(const Step& step, int64_t unit, int64_t p, const Scratch& s) const {
    const int64_t at = (step.unit_copy * Blocks::kPairs + p) * kUnitKeys * W;
    return {s.probabilities.get() + at, s.d_scores.get() + at,
            d_score_pairs(step, unit - step.first, p, s)};
  }
  uint32_t* d_score_pairs(const Step& step, int64_t u, int64_t p, const Scratch& s) const {
    return s.d_score_pairs.get() +
           ((step.copy * Blocks::kPairs + p) * blocks_.units + u) * 2 * kTile;
  }

  // dQ, dK and dV of a block.
  void add_gradients(const Block& block, Scratch& s) const {
    s.gradients_begin = s.gradients_end = 0;
    Step step = {block.units.begin};
    each_item(block, !blocks_.keeps, s, [&](const Item& item, const Item& next, const auto& slot) {
      if (kPipelined) queue_gradients(block.pairs() - item.pair, s);
      const int64_t u = item.unit - block.units.begin;
      step.first = block.units.begin + u / blocks_.units * blocks_.units;
      step.units[item.pair] |= 1u << (item.unit - step.first);
      step.pairs |= 1u << item.pair;
      const Pair pair = pair_of(block, item.pair, s);
      const BackwardUnit unit = unit_of(item, s);
      const BackwardFactors out = factors(step, item.unit, item.pair, s);
      float* sums = s.row_sum.get() + pair.first;
      const bool is_edited = blocks_.keeps ? s.is_edited[slot_of(item)] != 0
                                           : gradients_.edit(pair, first_key(block, item), unit);
      with(is_edited, blocks_.keeps, [&](auto edited, auto kept) {
        gradients_.template find<edited(), kept()>(pair, unit, out, sums, slot);
      });
      if (next.unit == item.unit) return;
      // Of the unit before.
      queue_gradients(1, s);
      s.gradients_begin = s.gradients_end = 0;
      add_d_key_value(block, item.unit, step, s);
      step.unit_copy = (step.unit_copy + 1) % kCopies;
      step.pairs = 0;
      if (next.unit >= std::min(step.first + blocks_.units, block.units.end)) {
        for (int64_t p = 0; p < block.pairs(); ++p) add_d_query(block, step, p, s);
        step.copy = (step.copy + 1) % kCopies;
      }
      if (!kPipelined) queue_gradients(1, s);
    });
    queue_gradients(1, s);
    s.work.finish();
  }

  // One share of so many of the products that are still to be made.
  void queue_gradients(int64_t shares, Scratch& s) const {
    const int64_t count = ceil_div(s.gradients_end - s.gradients_begin, shares);
    for (int64_t i = 0; i < count; ++i) s.work.add(s.gradients[s.gradients_begin++]);
  }

  // dV += P^T dO and dK += dS^T Q of a unit.
  void add_d_key_value(const Block& block, int64_t unit, const Step& step, Scratch& s) const {
    const Part& part = block.part;
    const Range pairs = range_of(step.pairs);
    for (int64_t p = pairs.begin; p < pairs.end; ++p) {
      if (has(step.pairs, p)) continue;
      const BackwardFactors unseen = factors(step, unit, p, s);
      std::fill(unseen.probabilities, unseen.probabilities + kUnitKeys * W, 0u);
      std::fill(unseen.d_scores, unseen.d_scores + kUnitKeys * W, 0u);
    }
    const auto add = [&](const uint32_t* left, const uint32_t* right, int64_t columns,
                         float* sums) {
      for (int64_t c = 0; c < columns; c += 2 * W) {
        s.gradients[s.gradients_end++] = {
            Kind::kAddedProducts,
            pairs.end - pairs.begin,
            {left, kTileBytes, 2 * kTileBytes},
            {right + (pairs.begin * columns + c) * W, kTileBytes, 4 * columns * W},
            {sums + c, 4 * W * columns, 4 * W, 4 * columns},
            {keys_of(part, unit), kPairQueries, rows_of(block, pairs.end - 1)}};
      }
    };
    const BackwardFactors from = factors(step, unit, pairs.begin, s);
    const int64_t key = unit * kUnitKeys;
    add(from.probabilities, s.queries.d_out_pairs.get(), blocks_.value_columns,
        part.d_value + key * blocks_.value_columns);
    add(from.d_scores, s.queries.query_pairs.get(), blocks_.head_columns,
        part.d_key + key * blocks_.head_columns);
  }

  // dQ^T += K^T dS^T of a pair and a step, whose units it forgets.
  void add_d_query(const Block& block, Step& step, int64_t p, Scratch& s) const {
    if (step.units[p] == 0) return;
    const int64_t columns = blocks_.head_columns;
    const Range units = range_of(step.units[p]);
    for (int64_t u = units.begin; u < units.end; ++u) {
      if (has(step.units[p], u)) continue;
      uint32_t* unseen = d_score_pairs(step, u, p, s);
      std::fill(unseen, unseen + 2 * kTile, 0u);
    }
    const uint32_t* right = d_score_pairs(step, units.begin, p, s);
    const uint32_t* left = s.keys.key_columns.get() + (step.first + units.begin) * columns * W;
    for (int64_t h = 0; h < columns; h += 2 * W) {
      s.gradients[s.gradients_end++] = {
          Kind::kAddedProducts,
          units.end - units.begin,
          {left + h * W, kTileBytes, 4 * columns * W},
          {right, kTileBytes, 2 * kTileBytes},
          {s.d_query.get() + (p * columns + h) * 2 * W, 2 * kTileBytes, kTileBytes},
          {2 * W, rows_of(block, p), keys_of(block.part, step.first + units.end - 1)}};
    }
    step.units[p] = 0;
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
