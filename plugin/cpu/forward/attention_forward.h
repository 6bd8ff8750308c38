// Flash attention forward: for each block of queries, one pass over the blocks of keys that any of
// its rows sees, with an online softmax (Milakov and Gimelshein 2018; Dao 2023).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/forward_rows.h"
#include "cpu/forward/online_softmax.h"
#include "cpu/forward/packed_key_values.h"
#include "cpu/rows/section_tasks.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class AttentionForward {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  static constexpr int R = Core::kTileRows, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr int kStep = ForwardBlocks<Core>::kStep;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  using Rules = LogitRules<Isa, kBlockKeys>;
  using Softmax = OnlineSoftmax<Core>;
  using Group = RowGroup<Isa, Rules>;
  // Heads for each thread, at least, for which a task packs the keys that it alone reads: they stay
  // in its cache. Fewer are packed by all threads.
  static constexpr int64_t kMinHeads = 4;

 public:
  AttentionForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        head_lanes_(row_lanes<Core>(call.H)),
        value_panels_(ceil_div(call.V, C)),
        value_columns_(value_panels_ * C),
        block_keys_(ForwardBlocks<Core>::block_keys(call)),
        tasks_(call, call.N,
               [](const Section& x) { return ceil_div(x.rows.end - x.rows.begin, kBlockRows); }),
        packs_in_tasks_(call.N == call.K && call.T <= kBlockRows &&
                        call.B * call.K >= kMinHeads * parallel.threads()),
        key_values_(call),
        packed_(call, key_values_),
        mask_tiles_(call),
        rows_(call, key_values_),
        softmax_(call),
        scratch_(parallel.threads()) {}

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    key_values_.prepare(parallel_);
    mask_tiles_.find(parallel_);
    if (!packs_in_tasks_) packed_.pack_all(parallel_);
    parallel_.run(tasks_.size(), [this](int64_t task) { attend(tasks_[task]); });
  }

 private:
  struct Scratch {
    RowScratch<Core> load;
    std::optional<PackedKeyValues<Core>> packed;  // of one head, where tasks pack
    Buffer<Lane> query;                           // row tiles
    Buffer<float> out;                            // [kBlockRows][value_columns]
    Buffer<float> scores;        // [kGroupRows][kBlockKeys]; int32 before they are scaled
    Buffer<Lane> probabilities;  // [kGroupRows][kBlockKeys / G]; the scores where G == 1
  };

  void prepare(Scratch& s) const {
    s.load.prepare(call_);
    if (packs_in_tasks_ && !s.packed) {
      s.packed.emplace(call_, key_values_);
      s.packed->allocate(1, round_up(call_.S, kStep));
    }
    s.query.allocate(kBlockRows * head_lanes_);
    s.out.allocate(kBlockRows * value_columns_);
    s.scores.allocate(kGroupRows * kBlockKeys);
    if (G != 1) s.probabilities.allocate(kGroupRows * kBlockKeys / G);
  }

  void attend(const SectionTask& task) {
    const int64_t b = task.b, n = task.head, k = n / (call_.N / call_.K);
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n, mask_tiles_.plane(b, n));
    const DropoutRow<Isa> dropout(call_, b, n);
    const int64_t first = task.section.rows.begin + task.index * kBlockRows;
    const Range rows{first, std::min(first + kBlockRows, task.section.rows.end)};
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);

    if (packs_in_tasks_) {
      for (int64_t key0 = 0; key0 < call_.S; key0 += kBlockKeys) {
        const int64_t end = std::min(key0 + kBlockKeys, round_up(call_.S, kStep));
        s.packed->pack(b * call_.K + k, {key0, end}, {0, 0}, s.load);
      }
    }
    const PackedKeyValues<Core>& packed = packs_in_tasks_ ? *s.packed : packed_;
    const int64_t slot = packs_in_tasks_ ? 0 : b * call_.K + k;
    RowState state;
    rows_.load(b, n, rows, s.load, s.query.get(), state);
    std::fill(s.out.get(), s.out.get() + kBlockRows * value_columns_, 0.0f);
    const Range visible = visibility.of_rows(rows);
    for (int64_t key0 = visible.begin / block_keys_ * block_keys_; key0 < visible.end;
         key0 += block_keys_) {
      const KeyBlock<Core> keys{b, k, key0, packed, slot, key0};
      for (int64_t g = 0; g < rows.end - rows.begin; g += kGroupRows) {
        const Group group{
            visibility, rules,
            dropout,    {rows.begin + g, std::min(rows.begin + g + kGroupRows, rows.end)},
            g,          state};
        const Range seen = intersect(visibility.of_rows(group.rows), {key0, key0 + block_keys_});
        for (Range run = rules.first_run(group.rows, seen, kStep); !run.empty();
             run = rules.first_run(group.rows, {run.end, seen.end}, kStep)) {
          attend_group(group, keys, keys.columns(run), s);
        }
      }
    }
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      rows_.store(b, n, rows.begin + r, r, s.out.get() + r * value_columns_, state);
    }
  }

  // `seen`: adjacent columns of the block that any row of the group sees.
  void attend_group(const Group& group, const KeyBlock<Core>& keys, Range seen, Scratch& s) const {
    const Range columns{seen.begin / kStep * kStep, round_up(seen.end, kStep)};
    const Lane* query = s.query.get() + group.first * head_lanes_;
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      for (int t = 0; t < kGroupRows; t += R) {
        score_tile<Core>(query + t * head_lanes_, keys.key_panels(j), head_lanes_,
                         s.scores.get() + t * kBlockKeys + j, kBlockKeys);
      }
    }
    typename Softmax::Scores scores;
    scores.scores = s.scores.get();
    scores.probabilities = G == 1 ? reinterpret_cast<Lane*>(s.scores.get()) : s.probabilities.get();
    for (int64_t r = group.count(); r < kGroupRows; ++r) {
      scores.rescale[r] = 1.0f;
      for (auto& factor : scores.subtile_factor) factor[r] = 0.0f;
    }
    for (int64_t r = 0; r < group.count(); ++r) find_probabilities(group, r, keys, columns, scores);
    if (group.dropout.any()) drop(group, keys, columns, scores);
    float* out = s.out.get() + group.first * value_columns_;
    multiply_values(keys, columns, group.count(), scores, out);
    rows_.add_unpacked_values(keys, seen, group.count(), s.load, out, [&](int64_t r, int64_t c) {
      return probability(group, r, keys, c, scores);
    });
  }

  // Of row r of the group.
  void find_probabilities(const Group& group, int64_t r, const KeyBlock<Core>& keys, Range columns,
                          typename Softmax::Scores& scores) const {
    const int64_t row = group.first + r;
    const Range seen = keys.columns(group.visible(r));
    // Where probabilities have 8 bits the last bit of a logit can decide, so it is made in the same
    // way whatever the block is: subtile by subtile.
    const int64_t step = kInt8 ? kSubtileKeys : columns.end - columns.begin;
    uint32_t edited = 0;
    for (int64_t j = columns.begin; j < columns.end; j += step) {
      const Range part{j, j + step};
      if (contains(seen, part) && !key_values_.has_offsets() &&
          !group.rules.any(group.rows, keys.keys(part))) {
        continue;
      }
      softmax_.edit(group, r, keys, part, scores.scores + r * kBlockKeys);
      edited |= 1u << (j / kSubtileKeys);
    }
    if constexpr (kInt8) {
      const auto run = key_values_.has_value_offsets() ? &Softmax::template run_int8<true>
                                                       : &Softmax::template run_int8<false>;
      (softmax_.*run)(r, row, keys.scales(), columns, edited, group.state, scores);
    } else if (kBf16 && edited == 0) {
      softmax_.template run<true>(r, row, columns, group.state, scores);
    } else {
      softmax_.template run<false>(r, row, columns, group.state, scores);
    }
  }

  // Takes what is dropped out of the probabilities; their sum has it.
  void drop(const Group& group, const KeyBlock<Core>& keys, Range columns,
            typename Softmax::Scores& scores) const {
    uint8_t scratch[DropoutRow<Isa>::bytes(kBlockKeys)];
    const int64_t count = columns.end - columns.begin;
    for (int64_t r = 0; r < group.count(); ++r) {
      const uint8_t* keep = group.dropout.find(group.rows.begin + r, keys.first + columns.begin,
                                               keys.first + columns.end, scratch);
      auto* row =
          reinterpret_cast<ProbabilityElement<Core>*>(scores.probabilities + r * (kBlockKeys / G));
      zero_dropped<Isa>(keep, count, row + columns.begin);
      if constexpr (kInt8) {
        float* logits = scores.scores + r * kBlockKeys + columns.begin;
        for (int64_t j = 0; j < count; ++j) logits[j] = keep[j] ? logits[j] : kHidden;
      }
    }
  }

  // `out`, of `rows` rows, takes the values of `columns`.
  void multiply_values(const KeyBlock<Core>& keys, Range columns, int64_t rows,
                       const typename Softmax::Scores& scores, float* out) const {
    const int64_t panel_stride = keys.packed.value_panel_stride();
    for (int64_t r = 0; kInt8 && r < rows; ++r) {
      if (scores.rescale[r] == 1.0f) continue;
      scale_row<Isa>(out + r * value_columns_, value_columns_, scores.rescale[r]);
    }
    const int64_t step = kInt8 ? kSubtileKeys : columns.end - columns.begin;
    const ValueRows<Core, kBlockKeys / G> p_rows(scores.probabilities, columns.begin / G,
                                                 columns.end / G);
    for (int64_t p = 0; p < value_panels_; ++p) {
      for (int64_t j = columns.begin; j < columns.end; j += step) {
        const Lane* values = keys.value_lines(j) + p * panel_stride;
        const float* factor = kInt8 ? scores.subtile_factor[j / kSubtileKeys] : scores.rescale;
        for (int t = 0; t < kGroupRows; t += R) {
          value_tile<Core, kBlockKeys / G>(p_rows.tile(t, j / G), values, step / G,
                                           out + t * value_columns_ + p * C, value_columns_,
                                           factor + t);
        }
      }
    }
  }

  // The probability that row r of the group gives to column c.
  float probability(const Group& group, int64_t r, const KeyBlock<Core>& keys, int64_t c,
                    const typename Softmax::Scores& scores) const {
    const int64_t at = r * kBlockKeys + c;
    if constexpr (kInt8) {
      const float logit = scores.scores[at];
      // A row that has seen nothing has no maximum to subtract.
      if (logit == kHidden) return 0.0f;
      return std::exp2(logit - keys.scales().fold_log2[c] - group.state.maximum[group.first + r]);
    } else if constexpr (kBf16) {
      return float_from_bf16(reinterpret_cast<const uint16_t*>(scores.probabilities)[at]);
    } else {
      return scores.scores[at];
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t head_lanes_, value_panels_, value_columns_, block_keys_;
  const SectionTasks tasks_;
  const bool packs_in_tasks_;
  KeyValueRows<Core> key_values_;
  PackedKeyValues<Core> packed_;
  MaskTiles mask_tiles_;
  const ForwardRows<Core> rows_;
  const Softmax softmax_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
