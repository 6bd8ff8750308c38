// Flash attention forward, transposed: a row of scores is a key, a lane a query. What its kernels
// share: tasks of row blocks that go over blocks of keys, and the way of their results out.
#pragma once

#include <algorithm>

#include "cpu/forward/forward_rows.h"
#include "cpu/forward/key_value_rows.h"
#include "cpu/rows/mask_tiles.h"
#include "cpu/rows/section_tasks.h"
#include "cpu/transposed/transposed_rows.h"

namespace jax_gluon::cpu {
namespace {

// 32 rows of a query head, adjacent keys that any of them sees, and where their packed queries and
// the sums of their values are: [2][value tiles * 16][16].
template <class Core>
struct TransposedRun {
  const typename TransposedRows<Core>::Group& group;
  int64_t head;  // kv head
  Range keys;
  const uint32_t* query;
  float* out;
};

// Whether rows of codes have zero points or minima: engines multiply codes as they are.
inline bool has_row_offsets(const AttentionCall& call) {
  const QuantizableOperand* operands[] = {&call.query, &call.key, &call.value};
  for (const QuantizableOperand* x : operands) {
    if (x->quantization.offset && x->quantization.head_block == 0) return true;
  }
  return false;
}

// An engine packs keys and values, and computes runs of them in steps of `kStepKeys`.
template <class Engine>
class TransposedForward {
  using Core = typename Engine::Core;
  using Isa = typename Core::Isa;
  using Rows = TransposedRows<Core>;
  using Rules = typename Rows::Rules;
  using Group = typename Rows::Group;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;
  static constexpr int W = kTileQueries;
  static constexpr int64_t kStepKeys = Engine::kStepKeys;
  // Sums of values of a task's rows stay in L2 while its keys go by.
  static constexpr int64_t kMaxTaskBlocks = 10;
  static_assert(kBlockRows % kPairQueries == 0);

 public:
  static bool takes(const AttentionCall& call) { return Engine::takes(call); }
  static KernelOffer offer(const AttentionForwardCall& call) { return Engine::offer(call); }
  static int64_t block_keys(const AttentionForwardCall& call) { return Engine::block_keys(call); }

  TransposedForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        block_steps_(block_keys(call) / kStepKeys),
        task_blocks_(
            std::min(kMaxTaskBlocks,
                     std::max<int64_t>(1, ceil_div(call.T, kBlockRows) * call.B * call.N /
                                              std::max<int64_t>(1, 4 * parallel.threads())))),
        tasks_(call, call.N,
               [this](const Section& x) {
                 return ceil_div(x.rows.end - x.rows.begin, task_blocks_ * kBlockRows);
               }),
        key_values_(call),
        engine_(call, key_values_),
        mask_tiles_(call),
        rows_(call, key_values_),
        scratch_(parallel.threads()) {}

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    key_values_.prepare(parallel_);
    mask_tiles_.find(parallel_);
    engine_.pack_all(parallel_);
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
    Buffer<uint32_t> query;  // row tiles of each block
    Buffer<float> out;       // of each pair: [2][value tiles * W][W]
    Buffer<float> results;   // [W][value tiles * W]
    typename Engine::Scratch engine;
  };

  int64_t columns() const { return engine_.value_tiles() * W; }

  void prepare(int64_t blocks, Scratch& s) const {
    s.load.prepare(call_);
    s.blocks.allocate(blocks);
    s.query.allocate(blocks * kBlockRows * engine_.lanes());
    const int64_t floats = blocks * kBlockRows * columns();
    s.out.allocate(floats);
    std::fill(s.out.get(), s.out.get() + floats, 0.0f);
    s.results.allocate(W * columns());
    engine_.prepare(s.engine);
  }

  void attend(const SectionTask& task) {
    const int64_t b = task.b, n = task.head, head = b * call_.K + n / (call_.N / call_.K);
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n, mask_tiles_.plane(b, n));
    const DropoutRow<Isa> dropout(call_, b, n);
    [[maybe_unused]] const typename Isa::Tiles tiles;
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    const int64_t begin = task.section.rows.begin + task.index * task_blocks_ * kBlockRows;
    const int64_t end = std::min(task.section.rows.end, begin + task_blocks_ * kBlockRows);
    const int64_t blocks = ceil_div(end - begin, kBlockRows);
    prepare(blocks, s);
    for (int64_t u = 0; u < blocks; ++u) {
      const int64_t first = begin + u * kBlockRows;
      const Range rows{first, std::min(end, first + kBlockRows)};
      uint32_t* query = s.query.get() + u * kBlockRows * engine_.lanes();
      s.blocks[u].rows = rows;
      rows_.load(b, n, rows, s.load, query, s.blocks[u].state);
      engine_.edit_query(query, round_up(rows.end - rows.begin, kPairQueries) * engine_.lanes());
    }
    const Range keys = visibility.of_rows({begin, end});
    const int64_t last = ceil_div(keys.end, kStepKeys);
    // Counted from key 0, so that blocks do not depend on how rows are divided.
    const int64_t first_block = keys.begin / kStepKeys / block_steps_;
    for (int64_t step = first_block * block_steps_; step < last; step += block_steps_) {
      const Range block{step * kStepKeys, std::min(step + block_steps_, last) * kStepKeys};
      for (int64_t u = 0; u < blocks; ++u) {
        const Range rows = s.blocks[u].rows;
        for (int64_t g = 0; g < rows.end - rows.begin; g += kPairQueries) {
          const Range pair{rows.begin + g, std::min(rows.begin + g + kPairQueries, rows.end)};
          const Group group{visibility, rules, dropout, pair, g, s.blocks[u].state};
          const Range seen = intersect(visibility.of_rows(pair), block);
          for (Range run = rules.first_run(pair, seen, kStepKeys); !run.empty();
               run = rules.first_run(pair, {run.end, seen.end}, kStepKeys)) {
            const int64_t row = u * kBlockRows + g;
            engine_.attend({group, head, run, s.query.get() + row * engine_.lanes(),
                            s.out.get() + row * columns()},
                           s.load, s.engine);
          }
        }
      }
    }
    for (int64_t u = 0; u < blocks; ++u) finish(b, n, u, s);
  }

  void finish(int64_t b, int64_t n, int64_t u, Scratch& s) const {
    RowBlock& block = s.blocks[u];
    RowState& state = block.state;
    for (int64_t g = 0; g < block.rows.end - block.rows.begin; g += W) {
      const float* out = s.out.get() + (u * kBlockRows + g) * columns();
      for (int64_t v = 0; v < columns(); v += W) {
        TransposedPack<Isa>::turn(out + v * W, W, s.results.get() + v, columns());
      }
      for (int64_t r = g; r < std::min(g + W, block.rows.end - block.rows.begin); ++r) {
        if (kInt8 && call_.bias) {
          state.origin[r] = state.maximum[r];
          state.maximum[r] = 0.0f;
        }
        rows_.store(b, n, block.rows.begin + r, r, s.results.get() + (r - g) * columns(), state);
      }
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t block_steps_, task_blocks_;
  const SectionTasks tasks_;
  KeyValueRows<Core> key_values_;
  Engine engine_;
  MaskTiles mask_tiles_;
  const ForwardRows<Core> rows_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
