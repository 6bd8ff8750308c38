// Flash attention backward in one pass of five products. For each block of queries: recompute S and
// dP = dO V^T for all keys that it sees and keep P and dP; then D = rowsum(P dP) is known, and
// dS = P (dP - D), dV += P^T dO, dK += dS^T Q, dQ = dS K. An output that was rounded has no part in
// D, so rows of dS sum to 0; of an exact one, and more keys than a tile has, D = rowsum(dO O), and
// P and dP are kept for one tile of keys only. A task owns the rows of a kv head's section (or a
// part of them) and sums of its own for dK and dV, and the order of every sum is fixed by the shape
// and the sections alone.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/backward/backward_blocks.h"
#include "cpu/backward/backward_rows.h"
#include "cpu/backward/backward_tiles.h"
#include "cpu/memory/buffer.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, Kernel kKernel>
class AttentionBackward {
  using Blocks = BackwardBlocks<Isa, kKernel>;
  using Block = BackwardBlock<Isa>;
  using Part = BackwardPart;
  using Tiles = BackwardTiles<Isa, kKernel>;
  using Scratch = typename Tiles::Scratch;
  static constexpr int64_t W = Isa::kLanes;

 public:
  AttentionBackward(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        rows_(call),
        blocks_(call, rows_.output_is_exact()),
        tasks_(call, call.K, [this](const Section& x) { return blocks_.parts(x); }),
        mask_tiles_(call),
        tiles_(call, rows_, blocks_, mask_tiles_),
        scratch_(parallel.threads()) {}

  static KernelOffer offer(const AttentionBackwardCall& call) { return Blocks::offer(call); }
  void describe(KernelRun& run) const { blocks_.describe(run); }

  void run() {
    if (call_.B * call_.N == 0) return;
    rows_.find_centers(parallel_);
    mask_tiles_.find(parallel_);
    find_sums();
    d_key_parts_.allocate(slots_ * blocks_.part_keys * blocks_.head_columns);
    d_value_parts_.allocate(slots_ * blocks_.part_keys * blocks_.value_columns);
    parallel_.run(tasks_.size(), [this](int64_t task) { differentiate(task); });
    parallel_.run(static_cast<int64_t>(sums_.size()),
                  [this](int64_t i) { sum_parts(sums_[static_cast<size_t>(i)]); });
  }

 private:
  // Keys of a section of more than one part, whose dK and dV are summed in the end.
  struct Sum {
    SectionTask task;
    Range keys;
  };

  // Parts of such sections have slots.
  void find_sums() {
    slot_.allocate(tasks_.size());
    for (int64_t t = 0; t < tasks_.size(); ++t) {
      const SectionTask task = tasks_[t];
      slot_[t] = -1;
      if (task.count == 1) continue;
      slot_[t] = slots_++;
      if (t != task.first) continue;
      const Range keys = task.section.keys;
      for (int64_t j = keys.begin; j < keys.end; j += Blocks::kMaxRows) {
        sums_.push_back({task, {j, std::min(j + Blocks::kMaxRows, keys.end)}});
      }
    }
  }

  void differentiate(int64_t t) {
    const SectionTask task = tasks_[t];
    const int64_t b = task.b, k = task.head;
    const Visibility visibility(call_, b);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    tiles_.prepare(task.count == 1, s);
    s.needs_row_sum = rows_.key_center(b, k) && rows_.key_center_matters();
    const Range rows = blocks_.rows_of_part(task.section, task.index);
    const Range keys = visibility.of_rows(rows);
    const int64_t first_key = Blocks::first_key(keys);
    Part part{visibility, b, k, keys, first_key, first_key, s.d_key.get(), s.d_value.get()};
    if (task.count > 1) {
      const int64_t at = slot_[t] * blocks_.part_keys;
      part.d_key = d_key_parts_.get() + at * blocks_.head_columns;
      part.d_value = d_value_parts_.get() + at * blocks_.value_columns;
    }
    if (!keys.empty()) {
      const int64_t count = round_up(keys.end - first_key, Blocks::kColumnStep);
      std::fill(part.d_key, part.d_key + count * blocks_.head_columns, 0.0f);
      std::fill(part.d_value, part.d_value + count * blocks_.value_columns, 0.0f);
    }
    const int64_t group = call_.N / call_.K, end = (k + 1) * group;
    for (int64_t n = k * group; n < end; n += blocks_.block_heads) {
      const int64_t heads = std::min(blocks_.block_heads, end - n);
      for (int64_t i = rows.begin; i < rows.end; i += blocks_.block_rows) {
        row_block({n, heads, {i, std::min(i + blocks_.block_rows, rows.end)}}, part, s);
      }
    }
    if (task.count > 1) return;
    for (int64_t j = task.section.keys.begin; j < task.section.keys.end; ++j) {
      const bool seen = keys.begin <= j && j < keys.end;
      const int64_t at = seen ? j - first_key : -1;
      store_key_value(b, j, k, at < 0 ? nullptr : part.d_key + at * blocks_.head_columns,
                      at < 0 ? nullptr : part.d_value + at * blocks_.value_columns, s.rows.get());
    }
  }

  // dK and dV of a key; null where no row sees it. `zeros` is scratch.
  void store_key_value(int64_t b, int64_t j, int64_t k, const float* d_key, const float* d_value,
                       float* zeros) const {
    if (!d_key) std::fill(zeros, zeros + std::max(call_.H, call_.V), 0.0f);
    store_row<Isa>(call_.d_key, call_.d_key.at(b, j, k), d_key ? d_key : zeros, call_.H,
                   call_.scale);
    store_row<Isa>(call_.d_value, call_.d_value.at(b, j, k), d_key ? d_value : zeros, call_.V,
                   1.0f);
  }

  void sum_parts(const Sum& sum) const {
    const SectionTask& task = sum.task;
    const Visibility visibility(call_, task.b);
    Buffer<float> zeros(std::max(call_.H, call_.V) + W);
    std::vector<Range> seen_by_part;
    seen_by_part.reserve(static_cast<size_t>(task.count));
    for (int64_t p = 0; p < task.count; ++p) {
      seen_by_part.push_back(visibility.of_rows(blocks_.rows_of_part(task.section, p)));
    }
    for (int64_t j = sum.keys.begin; j < sum.keys.end; ++j) {
      float *d_key = nullptr, *d_value = nullptr;
      for (int64_t p = 0; p < task.count; ++p) {
        const Range seen = seen_by_part[static_cast<size_t>(p)];
        if (j < seen.begin || j >= seen.end) continue;
        // The last part comes first.
        const int64_t slot = slot_[task.first + task.count - 1 - p];
        const int64_t at = slot * blocks_.part_keys + j - Blocks::first_key(seen);
        float* x = d_key_parts_.get() + at * blocks_.head_columns;
        float* y = d_value_parts_.get() + at * blocks_.value_columns;
        if (d_key) {
          add_row(d_key, x, blocks_.head_columns);
          add_row(d_value, y, blocks_.value_columns);
        } else {
          d_key = x;
          d_value = y;
        }
      }
      store_key_value(task.b, j, task.head, d_key, d_value, zeros.get());
    }
  }

  static void add_row(float* sum, const float* x, int64_t n) {
    for (int64_t h = 0; h < n; h += W) {
      Isa::store(sum + h, Isa::add(Isa::load(sum + h), Isa::load(x + h)));
    }
  }

  void row_block(const Block& block, Part& part, Scratch& s) const {
    const int64_t count = block.count(), padded = round_up(count, F32Core<Isa>::kGroupRows);
    float* dq = s.d_query.get();
    std::fill(dq, dq + padded * blocks_.head_columns, 0.0f);
    const Range keys = part.visibility.of_rows(block.queries);
    if (!keys.empty()) {
      tiles_.load_queries(part.b, block, s);
      tiles_.load_keys_to(keys.end, part, s);
      std::fill(s.weighted.get(), s.weighted.get() + padded * W, 0.0f);
      std::fill(s.total.get(), s.total.get() + padded * W, 0.0f);
      std::fill(s.row_sum.get(), s.row_sum.get() + padded, 0.0f);
      const int64_t first = (keys.begin - part.first_key) / blocks_.tile_keys;
      const int64_t last = ceil_div(keys.end - part.first_key, blocks_.tile_keys);
      for (int64_t t = first; blocks_.reads_output && t < last; ++t) {
        tiles_.find_probabilities(block, part, t, 0, s);
        tiles_.add_gradients(count, part, t, 0, s);
      }
      if (!blocks_.reads_output) whole_rows(block, part, {first, last}, s);
      add_key_center(part.b, part.k, count, dq, s);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = call_.d_query.at(part.b, block.query_of(r), block.head_of(r));
      store_row<Isa>(call_.d_query, at, dq + r * blocks_.head_columns, call_.H, call_.scale);
    }
  }

  // The gradients of tiles of keys, after D of the rows is found from all of them.
  void whole_rows(const Block& block, const Part& part, Range tiles, Scratch& s) const {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      tiles_.find_probabilities(block, part, t, t - tiles.begin, s);
    }
    for (int64_t r = 0; r < block.count(); ++r) {
      auto& statistics = s.statistics[r];
      statistics.delta += statistics.mean(Isa::reduce_add(Isa::load(s.weighted.get() + r * W)),
                                          Isa::reduce_add(Isa::load(s.total.get() + r * W)));
    }
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      tiles_.add_gradients(block.count(), part, t, t - tiles.begin, s);
    }
  }

  // dQ = dS (K + center): the center's part is rowsum(dS) * center.
  void add_key_center(int64_t b, int64_t k, int64_t rows, float* dq, Scratch& s) const {
    if (!s.needs_row_sum) return;
    const float* center = rows_.key_center(b, k);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < call_.H; ++h)
        dq[r * blocks_.head_columns + h] += s.row_sum[r] * center[h];
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  BackwardRows<Isa, AttentionBackwardCall> rows_;
  const Blocks blocks_;
  const SectionTasks tasks_;
  MaskTiles mask_tiles_;
  const Tiles tiles_;
  std::vector<Sum> sums_;
  Buffer<int64_t> slot_;  // of each task, which has d_key_parts_ and d_value_parts_; else -1
  int64_t slots_ = 0;
  Buffer<float> d_key_parts_, d_value_parts_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
