// The gluon pipeline of attention forward: a task takes all rows of a kv head that fit, and passes
// over its keys once, a ring of packed blocks ahead of it. A group of rows goes through a block by
// subtiles of keys: the products of the next one come before the softmax of this one, whose
// probabilities are multiplied with the values at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>

#include "cpu/forward/forward_rows.h"
#include "cpu/forward/key_value_ring.h"
#include "cpu/forward/online_softmax.h"
#include "cpu/forward/subtile_softmax.h"
#include "cpu/rows/section_tasks.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class AttentionForwardGluon {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  static constexpr int W = Isa::kLanes;
  static constexpr int R = Core::kTileRows, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr int kStep = ForwardBlocks<Core>::kStep;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  // Row blocks per task. A section's rows are divided to bound scratch, each task with a ring of
  // its own, or to keep threads busy, but then no finer than kMinBlocks, and what is packed is
  // shared.
  static constexpr int64_t kMaxBlocks = 43, kMinBlocks = 4;
  static constexpr int kKeys = ForwardBlocks<Core>::kSubtileColumns;  // of a subtile, at most
  using Rules = LogitRules<Isa, kKeys>;
  using Softmax = SubtileSoftmax<Core>;
  using SubtileRows = typename Softmax::Rows;
  using Yes = std::true_type;
  using No = std::false_type;

 public:
  AttentionForwardGluon(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        head_lanes_(row_lanes<Core>(call.H)),
        value_panels_(ceil_div(call.V, C)),
        value_columns_(value_panels_ * C),
        subtile_keys_(ForwardBlocks<Core>::subtile_keys(call)),
        wanted_tasks_(
            ceil_div(2 * parallel.threads(), std::max<int64_t>(call.K * count_sections(call), 1))),
        tasks_(call, call.K, [this](const Section& x) { return divide(x).tasks; }),
        key_values_(call),
        shared_(call, key_values_),
        mask_tiles_(call),
        rows_(call, key_values_),
        block_softmax_(call),
        scratch_(parallel.threads()) {
    for_each_section(call, [this](const Section& x, int64_t, const Visibility&) {
      shares_ |= divide(x).shares;
    });
  }

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    key_values_.prepare(parallel_);
    mask_tiles_.find(parallel_);
    if (shares_) shared_.pack_all(parallel_);
    parallel_.run(tasks_.size(), [this](int64_t task) { attend(tasks_[task]); });
  }

 private:
  // How the row blocks of a section, those of all query heads of a kv head, are divided.
  struct Division {
    int64_t head_blocks, blocks;  // of a query head, of all
    int64_t tasks, task_blocks;
    bool shares;  // whether for busy threads alone
  };

  Division divide(const Section& section) const {
    Division to = {};
    to.head_blocks = ceil_div(section.rows.end - section.rows.begin, kBlockRows);
    to.blocks = call_.N / std::max<int64_t>(call_.K, 1) * to.head_blocks;
    const int64_t min_tasks = std::max<int64_t>(1, ceil_div(to.blocks, kMaxBlocks));
    const int64_t busy = std::min(wanted_tasks_, ceil_div(to.blocks, kMinBlocks));
    to.task_blocks = std::max<int64_t>(1, ceil_div(to.blocks, std::max(min_tasks, busy)));
    to.tasks = ceil_div(to.blocks, to.task_blocks);
    to.shares = busy > min_tasks;
    return to;
  }

  // A row block of a task: rows of one query head.
  struct RowBlock {
    int64_t n;
    Range rows;
    RowState state;
  };

  struct Scratch {
    RowScratch<Core> load;
    std::optional<KeyValueRing<Core>> ring;
    Buffer<RowBlock> blocks;
    Buffer<Lane> query;               // row tiles of each block
    Buffer<float> out;                // [rows][value_columns]
    Buffer<float> sums, offset_sums;  // [rows][W]
    Buffer<float> scores;             // two of [kGroupRows][kKeys]
    Buffer<Lane> probabilities;       // [kGroupRows][kKeys / G]; the scores where G == 1
    Buffer<typename Softmax::Group> group;
  };

  struct Group : RowGroup<Isa, Rules> {
    int64_t row;  // the first, among those of the task
  };

  void prepare(int64_t blocks, Scratch& s) const {
    s.load.prepare(call_);
    if (!s.ring) s.ring.emplace(call_, key_values_);
    const int64_t rows = blocks * kBlockRows;
    s.blocks.allocate(blocks);
    s.group.allocate(1);
    s.group[0] = {};
    s.query.allocate(rows * head_lanes_);
    s.out.allocate(rows * value_columns_);
    s.sums.allocate(rows * W);
    if (key_values_.has_value_offsets()) s.offset_sums.allocate(rows * W);
    s.scores.allocate(2 * kGroupRows * kKeys);
    if (G != 1) s.probabilities.allocate(kGroupRows * kKeys / G);
  }

  void attend(const SectionTask& task) {
    const int64_t b = task.b, k = task.head, head = b * call_.K + k, group = call_.N / call_.K;
    const Division division = divide(task.section);
    const int64_t first = task.index * division.task_blocks;
    const int64_t last = std::min(first + division.task_blocks, division.blocks);
    const Visibility visibility(call_, b);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(division.task_blocks, s);

    const int64_t rows = (last - first) * kBlockRows;
    std::fill(s.out.get(), s.out.get() + rows * value_columns_, 0.0f);
    std::fill(s.sums.get(), s.sums.get() + rows * W, 0.0f);
    if (s.offset_sums.get()) std::fill(s.offset_sums.get(), s.offset_sums.get() + rows * W, 0.0f);
    Range keys{call_.S, 0};
    for (int64_t u = first; u < last; ++u) {
      RowBlock& block = s.blocks[u - first];
      const int64_t i0 = task.section.rows.begin + u % division.head_blocks * kBlockRows;
      block.n = k * group + u / division.head_blocks;
      block.rows = {i0, std::min(task.section.rows.end, i0 + kBlockRows)};
      rows_.load(b, block.n, block.rows, s.load,
                 s.query.get() + (u - first) * kBlockRows * head_lanes_, block.state);
      const Range seen = visibility.of_rows(block.rows);
      if (seen.empty()) continue;
      keys = {std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
    }
    KeyValueRing<Core>& ring = *s.ring;
    if (!shares_) ring.start(head, keys);
    for (int64_t key0 = ring.first_block(keys); key0 < keys.end; key0 += ring.block_keys()) {
      if (!shares_) ring.fill_ahead(key0, s.load);
      using Block = KeyBlock<Core>;
      const Block block = shares_ ? Block{b, k, key0, shared_, head, key0}
                                  : Block{b, k, key0, ring.packed(), ring.slot_of(key0), 0};
      for (int64_t u = 0; u < last - first; ++u) attend_block(visibility, block, u, s);
    }
    for (int64_t u = 0; u < last - first; ++u) finish(b, u, s);
  }

  void attend_block(const Visibility& visibility, const KeyBlock<Core>& keys, int64_t u,
                    Scratch& s) const {
    RowBlock& block = s.blocks[u];
    const Range rows = block.rows, all = keys.keys({0, s.ring->block_keys()});
    if (intersect(visibility.of_rows(rows), all).empty()) return;
    const Rules rules(call_, keys.b, block.n, mask_tiles_.plane(keys.b, block.n));
    const DropoutRow<Isa> dropout(call_, keys.b, block.n);
    for (int64_t g = 0; g < rows.end - rows.begin; g += kGroupRows) {
      const Range queries{rows.begin + g, std::min(rows.begin + g + kGroupRows, rows.end)};
      const Group group{{visibility, rules, dropout, queries, g, block.state}, u * kBlockRows + g};
      const Range seen = intersect(visibility.of_rows(queries), all);
      for (Range run = rules.first_run(queries, seen, kStep); !run.empty();
           run = rules.first_run(queries, {run.end, seen.end}, kStep)) {
        attend_run(group, keys, keys.columns(run), s);
      }
    }
  }

  // `seen`: adjacent columns of the block that any row of the group sees.
  void attend_run(const Group& group, const KeyBlock<Core>& keys, Range seen, Scratch& s) const {
    const Range columns{seen.begin / kStep * kStep, round_up(seen.end, kStep)};
    float* scores = s.scores.get();
    float* next_scores = scores + kGroupRows * kKeys;
    const Lane* query = s.query.get() + group.row * head_lanes_;
    const auto subtile_at = [&](int64_t j) {
      return Range{j, std::min(j + subtile_keys_, columns.end)};
    };
    multiply_keys(query, keys, subtile_at(columns.begin), scores);
    for (int64_t j = columns.begin; j < columns.end;
         j += subtile_keys_, std::swap(scores, next_scores)) {
      const int64_t next = j + subtile_keys_;
      if (next < columns.end) multiply_keys(query, keys, subtile_at(next), next_scores);
      const Range subtile = subtile_at(j);
      attend_subtile(group, keys.from(j), subtile.end - j, keys.keys(columns), scores, s);
    }
  }

  void multiply_keys(const Lane* query, const KeyBlock<Core>& keys, Range columns,
                     float* scores) const {
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      for (int t = 0; t < kGroupRows; t += R) {
        score_tile<Core>(query + t * head_lanes_, keys.key_panels(j), head_lanes_,
                         scores + t * kKeys + j - columns.begin, kKeys);
      }
    }
  }

  // Softmax and values of a subtile, the first `columns` of `keys`; `seen` are the keys of the run
  // that the group computes, `scores` the subtile's products.
  void attend_subtile(const Group& group, const KeyBlock<Core>& keys, int64_t columns, Range seen,
                      float* scores, Scratch& s) const {
    RowState& state = group.state;
    const int64_t rows = group.count();
    Lane* probabilities = G == 1 ? reinterpret_cast<Lane*>(scores) : s.probabilities.get();
    const SubtileRows all_rows{scores, probabilities, state.factor + group.first,
                               state.maximum + group.first, state.key_bias + group.first};
    const bool has_zeros =
        std::memchr(keys.has_zeros(), 1, static_cast<size_t>(columns)) != nullptr;
    const KeyScales scales = keys.scales();
    const bool edit_all =
        group.rules.any(group.rows, keys.keys({0, columns})) || key_values_.has_offsets();
    const bool inside = !edit_all && group.visibility.all_see(group.rows, seen);
    s.group[0].rescales = false;
    int64_t done = 0;
    if constexpr (kInt8 && Softmax::kRowsAtOnce > 1) {
      constexpr int kRows = Softmax::kRowsAtOnce;
      for (; inside && done + kRows <= rows; done += kRows) {
        run_int8<kRows>(false, has_zeros, scales, all_rows.from(done), done, s.group[0]);
      }
    }
    for (int64_t r = done; r < rows; ++r) {
      const SubtileRows row = all_rows.from(r);
      const bool edit =
          !inside && (edit_all || !contains(group.visible(r), keys.keys({0, columns})));
      if (edit) {
        block_softmax_.edit(group, r, keys, {0, columns}, row.scores);
        if (kInt8 && call_.bias) {
          const int64_t i = group.first + r;
          block_softmax_.move_origin(0, columns, row.scores, i, state, state.maximum[i]);
        }
      }
      if constexpr (kInt8) {
        run_int8<1>(edit, has_zeros, scales, row, r, s.group[0]);
      } else if (kBf16 && !edit) {
        Softmax::template run_row<true>(row, columns, r, s.group[0]);
      } else {
        Softmax::template run_row<false>(row, columns, r, s.group[0]);
      }
    }
    if (group.dropout.any()) drop(group, keys, columns, scores, probabilities);
    float* sums = s.sums.get() + group.row * W;
    float* offset_sums =
        key_values_.has_value_offsets() ? s.offset_sums.get() + group.row * W : nullptr;
    Softmax::finish(state.maximum + group.first, sums, offset_sums, s.group[0]);
    float* out = s.out.get() + group.row * value_columns_;
    multiply_values(probabilities, keys, columns, rows, s.group[0], out);
    if (!has_zeros) return;
    rows_.add_unpacked_values(keys, {0, columns}, rows, s.load, out, [&](int64_t r, int64_t c) {
      if constexpr (kInt8) {
        const float logit = scores[r * kKeys + c], maximum = state.maximum[group.first + r];
        return logit == kHidden ? 0.0f : std::exp2(logit - scales.fold_log2[c] - maximum);
      } else if constexpr (kBf16) {
        return float_from_bf16(reinterpret_cast<const uint16_t*>(probabilities)[r * kKeys + c]);
      } else {
        return scores[r * kKeys + c];
      }
    });
  }

  // Takes what is dropped out of the probabilities; their sum has it.
  void drop(const Group& group, const KeyBlock<Core>& keys, int64_t columns, float* scores,
            Lane* probabilities) const {
    uint8_t scratch[DropoutRow<Isa>::bytes(kKeys)];
    for (int64_t r = 0; r < group.count(); ++r) {
      const uint8_t* keep =
          group.dropout.find(group.rows.begin + r, keys.first, keys.first + columns, scratch);
      zero_dropped<Isa>(
          keep, columns,
          reinterpret_cast<ProbabilityElement<Core>*>(probabilities + r * (kKeys / G)));
      if constexpr (kInt8) {
        for (int64_t j = 0; j < columns; ++j) {
          scores[r * kKeys + j] = keep[j] ? scores[r * kKeys + j] : kHidden;
        }
      }
    }
  }

  // Rows r, r + 1... of the group, the first of `rows`.
  template <int kRows>
  void run_int8(bool are_logits, bool keep, const KeyScales& scales, const SubtileRows& rows,
                int64_t r, typename Softmax::Group& group) const {
    const auto run = [&](auto logits, auto keeps, auto has_offsets) {
      Softmax::template run_rows_int8<kRows, logits(), keeps(), has_offsets()>(scales, rows, r,
                                                                               group);
    };
    const auto run_kind = [&](auto keeps, auto has_offsets) {
      are_logits ? run(Yes(), keeps, has_offsets) : run(No(), keeps, has_offsets);
    };
    if (key_values_.has_value_offsets()) {
      run_kind(Yes(), Yes());
    } else if (keep) {
      run_kind(Yes(), No());
    } else {
      run_kind(No(), No());
    }
  }

  void multiply_values(const Lane* probabilities, const KeyBlock<Core>& keys, int64_t columns,
                       int64_t rows, const typename Softmax::Group& group, float* out) const {
    const Lane* values = keys.value_lines(0);
    const int64_t panel_stride = keys.packed.value_panel_stride();
    if (kInt8 && group.rescales) {
      for (int64_t r = 0; r < rows; ++r) {
        if (group.rescale[r] != 1.0f) {
          scale_row<Isa>(out + r * value_columns_, value_columns_, group.rescale[r]);
        }
      }
    }
    const float* factor = kInt8 ? group.factor : group.rescale;
    const ValueRows<Core, kKeys / G> p_rows(probabilities, 0, columns / G);
    for (int64_t p = 0; p < value_panels_; ++p, values += panel_stride) {
      for (int t = 0; t < kGroupRows; t += R) {
        value_tile<Core, kKeys / G>(p_rows.tile(t, 0), values, columns / G,
                                    out + t * value_columns_ + p * C, value_columns_, factor + t);
      }
    }
  }

  void finish(int64_t b, int64_t u, Scratch& s) const {
    RowBlock& block = s.blocks[u];
    for (int64_t r = 0; r < block.rows.end - block.rows.begin; ++r) {
      const int64_t at = u * kBlockRows + r;
      block.state.sum[r] = Isa::reduce_add(Isa::load(s.sums.get() + at * W));
      if (key_values_.has_value_offsets()) {
        block.state.value_offset[r] = Isa::reduce_add(Isa::load(s.offset_sums.get() + at * W));
      }
      rows_.store(b, block.n, block.rows.begin + r, r, s.out.get() + at * value_columns_,
                  block.state);
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t head_lanes_, value_panels_, value_columns_;
  const int64_t subtile_keys_;
  const int64_t wanted_tasks_;  // of a section, so that all threads are busy
  const SectionTasks tasks_;
  bool shares_ = false;
  KeyValueRows<Core> key_values_;
  PackedKeyValues<Core> shared_;  // all keys and values, where tasks share them
  MaskTiles mask_tiles_;
  const ForwardRows<Core> rows_;
  const OnlineSoftmax<Core> block_softmax_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
