// Attention forward over few keys, in float32: blocks of rows, each with the scores of all keys.
#pragma once

#include <cmath>

#include "cpu/rows/quantized_rows.h"
#include "cpu/rows/sink.h"
#include "cpu/small/small_heads.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class SmallForward {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;
  using Heads = SmallHeads<Isa>;
  using Rules = typename Heads::Rules;
  using Product = typename Heads::Product;

 public:
  SmallForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call), parallel_(parallel), heads_(call), scratch_(parallel.threads()) {}

  void run() {
    heads_.run(
        parallel_, scratch_, true, [this](Scratch& s) { prepare(s); },
        [this](int64_t b, int64_t k, Range rows, Scratch& s) { attend(b, k, rows, s); });
  }

 private:
  struct Scratch {
    Buffer<float> memory;
    float *query, *key, *value;  // rows, padded with zeros
    float* key_panels;
    float *scores, *out;
    Buffer<float> finite_value;  // as value, 0 where that is not finite
  };
  // A kv head whose keys and values were loaded.
  struct KeyValues {
    typename Heads::Right keys;
    const float* finite_values;
    bool finite;  // all values
  };

  void prepare(Scratch& s) const {
    if (s.memory.get()) return;
    const int64_t T = std::min(call_.T, heads_.block_rows), S = call_.S;
    const int64_t H = heads_.head_width, V = heads_.value_width;
    Heads::lay_out(s.memory, {{&s.query, T * H},
                              {&s.key, heads_.columns * H},
                              {&s.value, S * V},
                              {&s.key_panels, heads_.panels_size(H)},
                              {&s.scores, T * heads_.columns},
                              {&s.out, T * V}});
  }

  void attend(int64_t b, int64_t k, Range rows, Scratch& s) const {
    const int64_t S = call_.S, H = heads_.head_width;
    const Visibility visibility(call_, b);
    heads_.stream(b, k, rows);
    load_head<Isa>(call_.key, {b, k, {0, S}}, call_.H, s.key, H);
    heads_.to_panels(s.key, H, s.key_panels);
    KeyValues key_values{{s.key, s.key_panels, H, call_.H}, s.value, true};
    if (!load_head<Isa>(call_.value, {b, k, {0, S}}, call_.V, s.value, heads_.value_width)) {
      const int64_t size = S * heads_.value_width;
      s.finite_value.allocate(size);
      std::copy(s.value, s.value + size, s.finite_value.get());
      replace_nonfinite(s.finite_value.get(), size);
      key_values.finite_values = s.finite_value.get();
      key_values.finite = false;
    }
    for (int64_t n = k * heads_.group; n < (k + 1) * heads_.group; ++n) {
      const Rules rules(call_, b, n);
      for (int64_t i = rows.begin; i < rows.end; i += heads_.block_rows) {
        const Range block{i, std::min(i + heads_.block_rows, rows.end)};
        attend_block({b, n, block}, visibility, rules, key_values, s);
      }
    }
  }

  void attend_block(const HeadRows& head, const Visibility& visibility, const Rules& rules,
                    const KeyValues& key_values, Scratch& s) const {
    const int64_t rows = head.count(), H = heads_.head_width, V = heads_.value_width;
    const Range columns = heads_.columns_of(visibility.of_rows(head.rows));
    load_head<Isa>(call_.query, head, call_.H, s.query, H);
    scale_row<Isa>(s.query, rows * H, call_.scale * kLog2E);
    heads_.scores(s.query, rows, key_values.keys, columns, s.scores);
    float maximum[Heads::kMaxBlockRows], sum[Heads::kMaxBlockRows];
    for (int64_t i = 0; i < rows; ++i) {
      float* scores = s.scores + i * heads_.columns;
      const Range visible = visibility.of_row(head.rows.begin + i);
      if (rules.any() || !contains(visible, columns)) {
        rules.apply(scores, head.rows.begin + i, 0, columns.begin, columns.end, visible);
      }
      softmax(scores, columns, maximum[i], sum[i]);
    }
    const int64_t depth = std::min(columns.end, call_.S) - columns.begin;
    Product::run({s.scores + columns.begin, rows, heads_.columns, 1},
                 Product::plain(key_values.finite_values + columns.begin * V, depth, V), V, s.out,
                 V);
    if (!key_values.finite) add_nonfinite_values(rows, columns, s);
    store(head, maximum, sum, s);
  }

  // Logits to probabilities, relative to 2^maximum.
  static void softmax(float* scores, Range columns, float& maximum, float& sum) {
    F largest = Isa::set1(kHidden);
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      largest = Isa::max(largest, Isa::load(scores + j));
    }
    maximum = Isa::reduce_max(largest);
    // A row that sees nothing has no maximum to subtract: all of it becomes 0, or stays NaN.
    const F reference = Isa::set1(maximum == kHidden ? 0.0f : maximum);
    F total = Isa::zero();
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      const F p = Isa::template exp2<5>(Isa::sub(Isa::load(scores + j), reference));
      Isa::store(scores + j, p);
      total = Isa::add(total, p);
    }
    sum = Isa::reduce_add(total);
  }

  // Elements that are not finite reach only the rows that see them, and change no bit of the
  // others.
  void add_nonfinite_values(int64_t rows, Range columns, Scratch& s) const {
    const int64_t V = heads_.value_width;
    for (int64_t j = columns.begin; j < std::min(columns.end, call_.S); ++j) {
      const float* value = s.value + j * V;
      if (all_finite<Isa>(value, V)) continue;
      for (int64_t i = 0; i < rows; ++i) {
        const float p = s.scores[i * heads_.columns + j];
        if (p == 0.0f) continue;
        for (int64_t v = 0; v < V; ++v) {
          if (!all_finite<Isa>(value + v, 1)) s.out[i * V + v] += p * value[v];
        }
      }
    }
  }

  void store(const HeadRows& head, const float* maximum, const float* sum, const Scratch& s) const {
    const int64_t index = call_.row_maximum.at(head.b, head.rows.begin, head.n);
    const int64_t step = call_.row_maximum.stride[1];
    float* row_maximum = static_cast<float*>(call_.row_maximum.data) + index;
    float* log2_sum = static_cast<float*>(call_.log2_sum.data) + index;
    const float sink = sink_of(call_, head.b, head.n);
    float factor[Heads::kMaxBlockRows];
    for (int64_t i = 0; i < head.count(); ++i) {
      const float reference = maximum[i] == kHidden ? 0.0f : maximum[i];
      const RowTotal total = total_of(sum[i], reference, sink);
      const bool empty = sum[i] == 0.0f;
      factor[i] = empty ? 0.0f : 1.0f / total.divisor;
      row_maximum[i * step] = empty ? 0.0f : total.maximum;
      log2_sum[i * step] = empty ? kEmptyRowLog2Sum : total.log2_sum;
    }
    store_head<Isa>(call_.out, head, {s.out, heads_.value_width, call_.V},
                    [&](int64_t i) { return factor[i]; });
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const Heads heads_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
