// Flash attention forward on matrix tiles, transposed: S^T = K Q^T, a softmax whose lanes are
// queries, O^T += V^T P^T. The baseline pipeline does one after the other; the gluon pipeline cuts
// the products of the next keys, and those of P with values, into the steps of the softmax.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/forward/forward_rows.h"
#include "cpu/forward/key_value_rows.h"
#include "cpu/rows/mask_tiles.h"
#include "cpu/rows/section_tasks.h"
#include "cpu/transposed/tile_program.h"
#include "cpu/transposed/transposed_key_values.h"
#include "cpu/transposed/transposed_rows.h"
#include "cpu/transposed/transposed_softmax.h"

namespace jax_gluon::cpu {
namespace {

template <class Core, Kernel kKernel>
class AttentionForwardTransposed {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  using Softmax = TransposedSoftmax<Core>;
  using Rows = TransposedRows<Core>;
  using Group = typename Rows::Group;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;
  static constexpr bool kPipelined = kKernel == Kernel::kGluon;
  static constexpr int W = kTileQueries;
  static constexpr int64_t kScores = 2 * kUnitKeys * W;         // floats of a unit
  static constexpr int64_t kProbabilities = kUnitKeys / 2 * W;  // lanes of a unit and column
  // Sums of values of a task's rows stay in L2 while its keys go by.
  static constexpr int64_t kMaxTaskBlocks = 10;
  static_assert(kBlockRows % kPairQueries == 0);

 public:
  // Codes are multiplied as they are, so none may have an offset.
  static bool takes(const AttentionCall& call) {
    if (!ForwardBlocks<Core>::takes(call)) return false;
    const QuantizableOperand* operands[] = {&call.query, &call.key, &call.value};
    for (const QuantizableOperand* x : operands) {
      if (kInt8 && x->quantization.offset && x->quantization.head_block == 0) return false;
    }
    return true;
  }
  static KernelOffer offer(const AttentionForwardCall& call) {
    // Keys and values of a block stay in L2, beside sums of values.
    constexpr int64_t kBytes = 512 * 1024, kStep = kBlockUnits * kUnitKeys;
    const int64_t bytes = 4 * row_lanes<Core>(call.H) + 2 * round_up(call.V, W);
    const int64_t keys =
        std::min(std::max(kBytes / bytes / kStep * kStep, 4 * kStep), kMaxBlockKeys);
    return {kKernel, name_of(Core::kArithmetic), {}, {keys, kStep, kMaxBlockKeys, kStep}, {}, {}};
  }
  static int64_t block_keys(const AttentionForwardCall& call) {
    return round_up(call.cpu_kernel.block_k, kBlockUnits * kUnitKeys);
  }

  AttentionForwardTransposed(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        block_units_(block_keys(call) / kUnitKeys),
        task_blocks_(
            std::min(kMaxTaskBlocks,
                     std::max<int64_t>(1, ceil_div(call.T, kBlockRows) * call.B * call.N /
                                              std::max<int64_t>(1, 4 * parallel.threads())))),
        tasks_(call, call.N,
               [this](const Section& x) {
                 return ceil_div(x.rows.end - x.rows.begin, task_blocks_ * kBlockRows);
               }),
        key_values_(call),
        packed_(call, key_values_),
        mask_tiles_(call),
        rows_(call, key_values_),
        scratch_(parallel.threads()) {
    const int64_t tiles = packed_.value_tiles(), stride = 4 * packed_.lanes();
    const int64_t steps = packed_.lanes() / 16;
    scores_.add_scores(steps, stride);
    scores_.finish();
    for (int64_t part = 0; part < kBlockUnits; ++part) {
      const int64_t first = tiles * part / kBlockUnits, last = tiles * (part + 1) / kBlockUnits;
      for (const bool has_scores : {false, true}) {
        TileProgram& program = parts_[has_scores][part];
        // Values last: nothing waits for their sums.
        if (has_scores) program.add_scores(steps, stride);
        program.add_values(first, last, tiles, kBlockUnits);
        program.finish();
      }
      values_[part].add_values(0, tiles, tiles, part + 1);
      values_[part].finish();
    }
  }

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    key_values_.prepare(parallel_);
    mask_tiles_.find(parallel_);
    packed_.pack_all(parallel_);
    parallel_.run(tasks_.size(), [this](int64_t task) { attend(tasks_[task]); });
  }

 private:
  struct RowBlock {
    Range rows;
    RowState state;
  };

  struct Scratch {
    RowScratch<Core> load;
    Buffer<RowBlock> blocks;
    Buffer<uint32_t> query;          // row tiles of each block
    Buffer<float> out;               // [pairs][2][value tiles][W][W]
    Buffer<float> scores;            // two of [2][kUnitKeys][W]
    Buffer<uint32_t> probabilities;  // two of [2][kBlockUnits][kUnitKeys / 2][W]
    Buffer<float> results;           // [W][value tiles * W]
  };

  int64_t out_floats() const { return 2 * packed_.value_tiles() * W * W; }

  void prepare(int64_t blocks, Scratch& s) const {
    s.load.prepare(call_);
    s.blocks.allocate(blocks);
    s.query.allocate(blocks * kBlockRows * packed_.lanes());
    const int64_t floats = blocks * (kBlockRows / kPairQueries) * out_floats();
    s.out.allocate(floats);
    std::fill(s.out.get(), s.out.get() + floats, 0.0f);
    s.scores.allocate(2 * kScores);
    constexpr int64_t kLanes = 2 * 2 * kBlockUnits * kProbabilities;
    s.probabilities.allocate(kLanes);
    std::fill(s.probabilities.get(), s.probabilities.get() + kLanes, uint32_t{0});
    s.results.allocate(W * packed_.value_tiles() * W);
  }

  void attend(const SectionTask& task) {
    const int64_t b = task.b, n = task.head, head = b * call_.K + n / (call_.N / call_.K);
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n, mask_tiles_.plane(b, n));
    const DropoutRow<Isa> dropout(call_, b, n);
    const typename Isa::Tiles tiles;
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    const int64_t begin = task.section.rows.begin + task.index * task_blocks_ * kBlockRows;
    const int64_t end = std::min(task.section.rows.end, begin + task_blocks_ * kBlockRows);
    const int64_t blocks = ceil_div(end - begin, kBlockRows);
    prepare(blocks, s);
    for (int64_t u = 0; u < blocks; ++u) {
      const int64_t first = begin + u * kBlockRows;
      s.blocks[u].rows = {first, std::min(end, first + kBlockRows)};
      rows_.load(b, n, s.blocks[u].rows, s.load, s.query.get() + u * kBlockRows * packed_.lanes(),
                 s.blocks[u].state);
    }
    const Range keys = visibility.of_rows({begin, end});
    const int64_t last = ceil_div(keys.end, kUnitKeys);
    // Counted from key 0, so that blocks do not depend on how rows are divided.
    const int64_t first_block = keys.begin / kUnitKeys / block_units_;
    for (int64_t unit = first_block * block_units_; unit < last; unit += block_units_) {
      const Range block{unit * kUnitKeys, std::min(unit + block_units_, last) * kUnitKeys};
      for (int64_t u = 0; u < blocks; ++u) {
        const Range rows = s.blocks[u].rows;
        for (int64_t g = 0; g < rows.end - rows.begin; g += kPairQueries) {
          const Range pair{rows.begin + g, std::min(rows.begin + g + kPairQueries, rows.end)};
          const Group group{visibility, rules, dropout, pair, g, s.blocks[u].state};
          const Range seen = intersect(visibility.of_rows(pair), block);
          for (Range run = rules.first_run(pair, seen, kUnitKeys); !run.empty();
               run = rules.first_run(pair, {run.end, seen.end}, kUnitKeys)) {
            Run(*this, group, head, run, u, s).attend();
          }
        }
      }
    }
    for (int64_t u = 0; u < blocks; ++u) finish(b, n, u, s);
  }

  // Adjacent keys of a block, and the pair of tile columns that sees them.
  class Run {
   public:
    Run(const AttentionForwardTransposed& kernel, const Group& group, int64_t head, Range keys,
        int64_t u, Scratch& s)
        : kernel_(kernel),
          packed_(kernel.packed_),
          group_(group),
          s_(s),
          head_(head),
          first_(keys.begin / kUnitKeys),
          last_(ceil_div(keys.end, kUnitKeys)),
          columns_(ceil_div(group.count(), W)),
          out_(s.out.get() + (u * (kBlockRows / kPairQueries) + group.first / kPairQueries) *
                                 kernel.out_floats()),
          query_(s.query.get() + (u * kBlockRows + group.first) * packed_.lanes()) {}

    void attend() {
      multiply(kernel_.scores_, first_, 0);
      for (unit_ = first_; unit_ < last_; ++unit_) {
        const bool has_next = unit_ + 1 < last_;
        if (kPipelined && has_previous()) {
          work_ = {kernel_.parts_[has_next][part()], operands(unit_ + 1, block() - 1),
                   columns_ * W};
          done_parts_ = part() + 1;
        } else if (kPipelined && has_next) {
          work_ = {kernel_.scores_, operands(unit_ + 1, 0), columns_ * W};
        }
        for (int64_t column = 0; column < columns_; ++column) attend_column(column);
        work_.finish();
        work_ = {};
        add_unpacked_values();
        if (kPipelined) continue;
        if (has_next) multiply(kernel_.scores_, unit_ + 1, 0);
        if (part() == kBlockUnits - 1) multiply_values(block(), kBlockUnits);
      }
      finish();
    }

   private:
    int64_t part() const { return (unit_ - first_) % kBlockUnits; }
    int64_t block() const { return (unit_ - first_) / kBlockUnits; }
    // Whether values of the block before are still to be multiplied.
    bool has_previous() const { return block() > settled_; }

    float* scores(int64_t unit) const { return s_.scores.get() + (unit - first_) % 2 * kScores; }
    uint32_t* probabilities(int64_t block, int64_t column, int64_t part) const {
      const int64_t at = (block % 2 * 2 + column) * kBlockUnits + part;
      return s_.probabilities.get() + at * kProbabilities;
    }

    // Of the scores of `unit`, and of the values of `block`.
    TileOperands operands(int64_t unit, int64_t block) const {
      const auto bytes = [](const void* p) { return static_cast<const char*>(p); };
      const int64_t lanes = packed_.lanes(), tiles = packed_.value_tiles();
      TileOperands at = {};
      at.keys = bytes(packed_.keys(head_, unit < last_ ? unit : first_));
      at.key_stride = 4 * lanes;
      at.query = bytes(query_);
      at.next_query = 4 * lanes * W;
      at.scores = reinterpret_cast<char*>(scores(unit));
      at.values = bytes(packed_.values(head_, first_ + block * kBlockUnits));
      at.probabilities = bytes(probabilities(block, 0, 0));
      at.out = reinterpret_cast<char*>(out_);
      at.next_out = tiles * kTileBytes;
      return at;
    }
    void multiply(const TileProgram& program, int64_t unit, int64_t block) const {
      TileWork<Core>(program, operands(unit, block), columns_ * W).finish();
    }
    void multiply_values(int64_t block, int64_t units) const {
      if (units > 0) multiply(kernel_.values_[units - 1], first_, block);
    }

    void attend_column(int64_t column) {
      const int64_t row = group_.first + column * W, key0 = unit_ * kUnitKeys;
      float* scores = this->scores(unit_) + column * kUnitKeys * W;
      const float* key_scale = kInt8 ? packed_.scales(head_, unit_) : nullptr;
      const Range keys{key0, key0 + kUnitKeys};
      const bool has_rules = group_.rules.any(group_.rows, keys);
      F factor = Isa::load(group_.state.factor + row), largest;
      // Keys past the last one are hidden too.
      if (has_rules || !group_.visibility.all_see(group_.rows, keys) ||
          Isa::any_less(factor, Isa::zero())) {
        Rows::to_logits(kernel_.call_, group_, column * W, key_scale, scores);
        if (has_rules) {
          Rows::apply(group_, column * W, key0, scores);
        } else {
          Rows::hide(group_, column * W, key0, scores);
        }
        factor = Isa::set1(1.0f);
        largest = Softmax::largest(scores);
      } else {
        largest = Isa::mul(Softmax::largest_product(scores, key_scale), factor);
      }
      float *maximum = group_.state.maximum + row, *sum = group_.state.sum + row;
      if (Softmax::outgrows(largest, Isa::load(maximum))) grow(column, largest, maximum, sum);
      uint32_t* out = probabilities(block(), column, part());
      const F total = Softmax::probabilities(scores, factor, Isa::load(maximum), out,
                                             [&](int step) { work_.advance(column * W + step); });
      Isa::store(sum, Isa::add(Isa::load(sum), total));
      if (group_.dropout.any()) Rows::drop(group_, column * W, key0, out);
    }

    // Moves references; all that is relative to them follows.
    void grow(int64_t column, F largest, float* maximum, float* sum) {
      settle();
      const F before = Isa::load(maximum), now = Softmax::grown(largest, before);
      const F change = Isa::template exp2<5>(Isa::sub(before, now));
      const F factor = Isa::where_less(before, now, change, Isa::set1(1.0f));
      float* out = out_ + column * packed_.value_tiles() * W * W;
      for (int64_t v = 0; v < packed_.value_tiles() * W; ++v) {
        Isa::store(out + v * W, Isa::mul(Isa::load(out + v * W), factor));
      }
      Isa::store(sum, Isa::mul(Isa::load(sum), factor));
      Isa::store(maximum, now);
    }

    // Multiplies values with all of P that there is before this unit.
    void settle() {
      work_.finish();
      finish_previous();
      if (part() == 0) return;
      multiply_values(block(), part());
      for (int64_t column = 0; column < 2; ++column) {
        uint32_t* first = probabilities(block(), column, 0);
        std::fill(first, first + part() * kProbabilities, uint32_t{0});
      }
    }
    // Products of the block before with the parts of values that are left.
    void finish_previous() {
      if (!kPipelined || !has_previous()) return;
      for (; done_parts_ < kBlockUnits; ++done_parts_) {
        multiply(kernel_.parts_[false][done_parts_], first_, block() - 1);
      }
      settled_ = block();
      done_parts_ = 0;
    }
    // What is left after the last unit.
    void finish() {
      unit_ = last_ - 1;
      finish_previous();
      if (kPipelined || part() != kBlockUnits - 1) multiply_values(block(), part() + 1);
    }

    // Adds P times values that are packed as zeros.
    void add_unpacked_values() const {
      const uint8_t* has_zeros = packed_.has_zeros(head_, unit_);
      const AttentionForwardCall& call = kernel_.call_;
      const int64_t b = head_ / call.K, k = head_ % call.K;
      const float per_unit = 1.0f / kernel_.key_values_.value_unit(head_);
      for (int64_t j = 0; j < kUnitKeys; ++j) {
        if (!has_zeros[j]) continue;
        float* value = s_.load.row.get();
        kernel_.key_values_.values().load(b, unit_ * kUnitKeys + j, k, value);
        for (int64_t r = 0; r < group_.count(); ++r) {
          const uint32_t pair = probabilities(block(), r / W, part())[j / 2 * W + r % W];
          const float p = float_from_bf16(static_cast<uint16_t>(pair >> (j % 2 * 16)));
          if (p == 0.0f) continue;
          float* out = out_ + r / W * packed_.value_tiles() * W * W + r % W;
          for (int64_t v = 0; v < call.V; ++v) out[v * W] += p * (value[v] * per_unit);
        }
      }
    }

    const AttentionForwardTransposed& kernel_;
    const TransposedKeyValues<Core>& packed_;
    const Group& group_;
    Scratch& s_;
    const int64_t head_, first_, last_, columns_;
    float* const out_;
    const uint32_t* const query_;
    int64_t unit_ = 0;
    TileWork<Core> work_;
    // Pipelined: blocks whose values are multiplied, and parts of those of the next.
    int64_t settled_ = 0, done_parts_ = 0;
  };

  void finish(int64_t b, int64_t n, int64_t u, Scratch& s) const {
    RowBlock& block = s.blocks[u];
    RowState& state = block.state;
    const int64_t tiles = packed_.value_tiles(), columns = tiles * W;
    for (int64_t g = 0; g < block.rows.end - block.rows.begin; g += W) {
      const float* out = s.out.get() + (u * kBlockRows + g) * columns;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        TransposedPack<Isa>::turn(out + tile * W * W, W, s.results.get() + tile * W, columns);
      }
      for (int64_t r = g; r < std::min(g + W, block.rows.end - block.rows.begin); ++r) {
        if (kInt8 && call_.bias) {
          state.origin[r] = state.maximum[r];
          state.maximum[r] = 0.0f;
        }
        rows_.store(b, n, block.rows.begin + r, r, s.results.get() + (r - g) * columns, state);
      }
    }
  }

  using Rules = typename Rows::Rules;

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t block_units_, task_blocks_;
  const SectionTasks tasks_;
  KeyValueRows<Core> key_values_;
  TransposedKeyValues<Core> packed_;
  MaskTiles mask_tiles_;
  const ForwardRows<Core> rows_;
  ScratchPool<Scratch> scratch_;
  // Of a unit's scores; of a part of a block's values, with the next unit's scores or without; of
  // all values of as many units.
  TileProgram scores_, parts_[2][kBlockUnits], values_[kBlockUnits];
};

}  // namespace
}  // namespace jax_gluon::cpu
