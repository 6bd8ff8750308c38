// Flash attention forward on matrix tiles, transposed: S^T = K Q^T, a softmax whose lanes are
// queries, O^T += V^T P^T. The baseline pipeline does one after the other; the gluon pipeline cuts
// the products of the next keys, and those of P with values, into the steps of the softmax.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/transposed/tile_program.h"
#include "cpu/transposed/transposed_forward.h"
#include "cpu/transposed/transposed_key_values.h"
#include "cpu/transposed/transposed_softmax.h"

namespace jax_gluon::cpu {
namespace {

template <class Core_, Kernel kKernel>
class TileEngine {
 public:
  using Core = Core_;

 private:
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

 public:
  static constexpr int64_t kStepKeys = kUnitKeys;

  static bool takes(const AttentionCall& call) {
    return ForwardBlocks<Core>::takes(call) && !(kInt8 && has_row_offsets(call));
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

  TileEngine(const AttentionForwardCall& call, const KeyValueRows<Core>& key_values)
      : call_(call), key_values_(key_values), packed_(call, key_values) {
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

  struct Scratch {
    Buffer<float> scores;            // two of [2][kUnitKeys][W]
    Buffer<uint32_t> probabilities;  // two of [2][kBlockUnits][kUnitKeys / 2][W]
  };

  int64_t lanes() const { return packed_.lanes(); }
  int64_t value_tiles() const { return packed_.value_tiles(); }
  void pack_all(Parallel& parallel) { packed_.pack_all(parallel); }
  void prepare(Scratch& s) const {
    s.scores.allocate(2 * kScores);
    constexpr int64_t kLanes = 2 * 2 * kBlockUnits * kProbabilities;
    s.probabilities.allocate(kLanes);
    std::fill(s.probabilities.get(), s.probabilities.get() + kLanes, uint32_t{0});
  }
  void edit_query(uint32_t*, int64_t) const {}
  void attend(const TransposedRun<Core>& run, RowScratch<Core>& load, Scratch& s) const {
    Run(*this, run, load, s).attend();
  }

 private:
  // Adjacent keys of a block, and the pair of tile columns that sees them.
  class Run {
   public:
    Run(const TileEngine& kernel, const TransposedRun<Core>& run, RowScratch<Core>& load,
        Scratch& s)
        : kernel_(kernel),
          packed_(kernel.packed_),
          group_(run.group),
          load_(load),
          s_(s),
          head_(run.head),
          first_(run.keys.begin / kUnitKeys),
          last_(ceil_div(run.keys.end, kUnitKeys)),
          columns_(ceil_div(run.group.count(), W)),
          out_(run.out),
          query_(run.query) {}

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
        float* value = load_.row.get();
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

    const TileEngine& kernel_;
    const TransposedKeyValues<Core>& packed_;
    const Group& group_;
    RowScratch<Core>& load_;
    Scratch& s_;
    const int64_t head_, first_, last_, columns_;
    float* const out_;
    const uint32_t* const query_;
    int64_t unit_ = 0;
    TileWork<Core> work_;
    // Pipelined: blocks whose values are multiplied, and parts of those of the next.
    int64_t settled_ = 0, done_parts_ = 0;
  };

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& key_values_;
  TransposedKeyValues<Core> packed_;
  // Of a unit's scores; of a part of a block's values, with the next unit's scores or without; of
  // all values of as many units.
  TileProgram scores_, parts_[2][kBlockUnits], values_[kBlockUnits];
};

template <class Core, Kernel kKernel>
using AttentionForwardTransposed = TransposedForward<TileEngine<Core, kKernel>>;

}  // namespace
}  // namespace jax_gluon::cpu
