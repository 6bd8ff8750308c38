// Products of tiles, cut into operations that run between the steps of a softmax: multi-stage
// pipelining. A processor does not look far enough ahead to do both at once by itself.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/memory/buffer.h"
#include "cpu/simd/compiler.h"
#include "cpu/transposed/tile_cores.h"

namespace jax_gluon::cpu {
namespace {

// Where the operands of a program's operations are: its offsets count from here, in bytes. Both
// columns of a pair are `next` apart.
struct TileOperands {
  const char* keys;  // of a unit
  int64_t key_stride;
  const char* query;
  int64_t next_query;
  char* scores;  // [2][kUnitKeys][kTileQueries]
  const char* values;
  const char* probabilities;  // [2][kBlockUnits] tiles
  char* out;                  // [2][value tiles] tiles
  int64_t next_out;

  static constexpr int64_t kNextScores = 2 * kTileBytes;
  static constexpr int64_t kNextProbabilities = kBlockUnits * kTileBytes;
};

// A pair of columns of one product: its first step makes the sums, the others add to them. Sums
// leave the registers when the next pair has begun: a store that waits for its products stops what
// comes behind it. So pairs take turns in two sets of registers.
struct TileOperation {
  enum class Kind : uint8_t { kStart, kStep, kStore };
  Kind kind;
  bool is_value;
  uint8_t set, column;  // column: of a store
  int64_t left, right, sums;
};

class TileProgram {
 public:
  // Scores of a unit: `steps` tiles along the head dim.
  void add_scores(int64_t steps, int64_t key_stride) {
    for (int64_t half = 0; half < 2; ++half) {
      add_pair(false, steps, {half * kTileQueries * key_stride, kTileStride}, half * kTileBytes);
    }
  }
  // Tiles [first, last) of `tiles` columns of values, of the first units of a block.
  void add_values(int64_t first, int64_t last, int64_t tiles, int64_t units) {
    for (int64_t v = first; v < last; ++v) {
      add_pair(true, units, {v * kTileBytes, tiles * kTileBytes}, v * kTileBytes);
    }
  }
  void finish() {
    if (waiting_.kind != TileOperation::Kind::kStore) return;
    store_waiting();
    last_stores_ = 2;
    waiting_ = {};
  }

  int64_t size() const { return size_; }
  // Those that only wait for what was before them.
  int64_t last_stores() const { return last_stores_; }
  const TileOperation& operator[](int64_t i) const { return operations_[i]; }

 private:
  struct Left {
    int64_t first, step;
  };

  void add_pair(bool is_value, int64_t steps, Left left, int64_t sums) {
    using Kind = TileOperation::Kind;
    for (int64_t s = 0; s < steps; ++s) {
      add({s == 0 ? Kind::kStart : Kind::kStep, is_value, set_, 0, left.first + s * left.step,
           s * kTileBytes, sums});
      if (s == 0 && waiting_.kind == Kind::kStore) store_waiting();
    }
    waiting_ = {Kind::kStore, is_value, set_, 0, 0, 0, sums};
    set_ ^= 1;
  }
  void store_waiting() {
    for (uint8_t column = 0; column < 2; ++column) {
      waiting_.column = column;
      add(waiting_);
    }
  }
  void add(const TileOperation& operation) {
    if (size_ == room_) {
      Buffer<TileOperation> larger(2 * room_ + 16);
      std::copy(operations_.get(), operations_.get() + size_, larger.get());
      operations_ = std::move(larger);
      room_ = 2 * room_ + 16;
    }
    operations_[size_++] = operation;
  }

  Buffer<TileOperation> operations_;
  int64_t size_ = 0, room_ = 0, last_stores_ = 0;
  uint8_t set_ = 0;
  TileOperation waiting_ = {};  // a store, where there is one
};

// A program on its way.
template <class Core>
class TileWork {
  using Isa = typename Core::Isa;
  using Tile = typename Isa::Tile;
  static_assert(Isa::kTileStride == kTileStride);
  // Products are done this many steps of a softmax before its end, for the stores to find them
  // done.
  static constexpr int64_t kRest = 4;
  // Of an operation: what a step adds is found once, so that no step has to divide.
  static constexpr int64_t kPart = 1 << 16;

 public:
  TileWork() = default;
  // To be done in this many steps of a softmax.
  TileWork(const TileProgram& program, const TileOperands& at, int64_t steps)
      : program_(&program),
        at_(at),
        steps_(steps),
        per_step_(kPart * (program.size() - program.last_stores()) / (steps - kRest) + 1) {}

  void finish() {
    if (program_) run_to(program_->size());
  }
  // What is to be done by the end of a step.
  JAX_GLUON_INLINE void advance(int64_t step) {
    if (!program_) return;
    const int64_t most = program_->size() - program_->last_stores(), left = steps_ - 1 - step;
    if (left < program_->last_stores()) {
      run_to(program_->size() - left);
    } else {
      run_to(std::min(most, (step + 1) * per_step_ / kPart));
    }
  }

 private:
  JAX_GLUON_INLINE void run_to(int64_t end) {
    for (; done_ < end; ++done_) {
      const TileOperation& operation = (*program_)[done_];
      operation.set == 0 ? run<0>(operation) : run<1>(operation);
    }
  }

  // Sums in registers 0 and 1, or 2 and 3; the left operand in 4 or 5.
  template <int kSet>
  JAX_GLUON_INLINE void run(const TileOperation& x) const {
    constexpr int c = 2 * kSet, d = c + 1, a = 4 + kSet;
    constexpr int64_t kStride = kTileStride;
    char* sums = (x.is_value ? at_.out : at_.scores) + x.sums;
    const int64_t next = x.is_value ? at_.next_out : TileOperands::kNextScores;
    if (x.kind == TileOperation::Kind::kStore) {
      if (x.column == 0) {
        Tile::template store<c>(sums, kStride);
      } else {
        Tile::template store<d>(sums + next, kStride);
      }
      return;
    }
    const bool starts = x.kind == TileOperation::Kind::kStart;
    if (x.is_value) {
      if (starts) {
        Tile::template load<c>(sums, kStride);
        Tile::template load<d>(sums + next, kStride);
      }
      Tile::template stream<a>(at_.values + x.left, kStride);
      Tile::template load<6>(at_.probabilities + x.right, kStride);
      Tile::template dot_bf16<c, a, 6>();
      Tile::template load<7>(at_.probabilities + x.right + TileOperands::kNextProbabilities,
                             kStride);
      Tile::template dot_bf16<d, a, 7>();
    } else {
      if (starts) {
        Tile::template zero<c>();
        Tile::template zero<d>();
      }
      Tile::template stream<a>(at_.keys + x.left, at_.key_stride);
      Tile::template load<6>(at_.query + x.right, kStride);
      Core::template dot_keys<c, a, 6>();
      Tile::template load<7>(at_.query + x.right + at_.next_query, kStride);
      Core::template dot_keys<d, a, 7>();
    }
  }

  const TileProgram* program_ = nullptr;
  TileOperands at_ = {};
  int64_t done_ = 0, steps_ = 0, per_step_ = 0;
};

}  // namespace
}  // namespace jax_gluon::cpu
