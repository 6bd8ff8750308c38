// Attention forward of few queries over few keys, in float32.
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

 public:
  SmallForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call), parallel_(parallel), heads_(call), scratch_(parallel.threads()) {}

  void run() {
    heads_.run(
        parallel_, scratch_, [this](Scratch& s) { prepare(s); },
        [this](int64_t b, int64_t k, Scratch& s) { attend(b, k, s); });
  }

 private:
  struct Scratch {
    Buffer<float> memory;
    float *query, *key, *value;  // rows, padded with zeros
    float* key_columns;
    float *scores, *out;
  };

  void prepare(Scratch& s) const {
    if (s.memory.get()) return;
    const int64_t T = call_.T, S = call_.S, H = heads_.head_width, V = heads_.value_width;
    Heads::lay_out(s.memory, {{&s.query, T * H},
                              {&s.key, heads_.columns * H},
                              {&s.value, S * V},
                              {&s.key_columns, heads_.columns_size(H)},
                              {&s.scores, T * heads_.columns},
                              {&s.out, T * V}});
  }

  void attend(int64_t b, int64_t k, Scratch& s) const {
    const int64_t T = call_.T, S = call_.S;
    const Visibility visibility(call_, b);
    if (k == 0) {
      stream_heads(call_.query, b, 0, T, call_.N, call_.H);
      stream_heads(call_.key, b, 0, S, call_.K, call_.H);
      stream_heads(call_.value, b, 0, S, call_.K, call_.V);
    }
    load_head<Isa>(call_.key, b, k, S, call_.H, s.key, heads_.head_width);
    const bool finite = load_head<Isa>(call_.value, b, k, S, call_.V, s.value, heads_.value_width);
    heads_.to_columns(s.key, heads_.head_width, s.key_columns);
    for (int64_t n = k * heads_.group; n < (k + 1) * heads_.group; ++n) {
      const Rules rules(call_, b, n);
      load_head<Isa>(call_.query, b, n, T, call_.H, s.query, heads_.head_width);
      scale_row<Isa>(s.query, T * heads_.head_width, call_.scale * kLog2E);
      heads_.scores(s.query, s.key, s.key_columns, heads_.head_width, call_.H, s.scores);
      float maximum[Heads::kMaxTokens], sum[Heads::kMaxTokens];
      for (int64_t i = 0; i < T; ++i) {
        float* scores = s.scores + i * heads_.columns;
        const Range visible = visibility.of_row(i);
        if (rules.any() || !contains(visible, {0, heads_.columns})) {
          rules.apply(scores, i, 0, 0, heads_.columns, visible);
        }
        softmax(scores, maximum[i], sum[i]);
      }
      if (finite) {
        SmallProduct<Isa>::run({s.scores, T, heads_.columns, 1}, s.value, heads_.value_width,
                               heads_.value_width, S, s.out, heads_.value_width);
      } else {
        add_seen_values(s);
      }
      store(b, n, maximum, sum, s);
    }
  }

  // Logits to probabilities, relative to 2^maximum.
  void softmax(float* scores, float& maximum, float& sum) const {
    F largest = Isa::set1(kHidden);
    for (int64_t j = 0; j < heads_.columns; j += W) {
      largest = Isa::max(largest, Isa::load(scores + j));
    }
    maximum = Isa::reduce_max(largest);
    // A row that sees nothing has no maximum to subtract: all of it becomes 0, or stays NaN.
    const F reference = Isa::set1(maximum == kHidden ? 0.0f : maximum);
    F total = Isa::zero();
    for (int64_t j = 0; j < heads_.columns; j += W) {
      const F p = Isa::template exp2<5>(Isa::sub(Isa::load(scores + j), reference));
      Isa::store(scores + j, p);
      total = Isa::add(total, p);
    }
    sum = Isa::reduce_add(total);
  }

  // Values that are not finite reach only the rows that see them.
  void add_seen_values(Scratch& s) const {
    std::fill(s.out, s.out + call_.T * heads_.value_width, 0.0f);
    for (int64_t i = 0; i < call_.T; ++i) {
      for (int64_t j = 0; j < call_.S; ++j) {
        const float p = s.scores[i * heads_.columns + j];
        if (p == 0.0f) continue;
        SmallProduct<Isa>::template run<true>({&p, 1, 0, 0}, s.value + j * heads_.value_width, 0,
                                              heads_.value_width, 1, s.out + i * heads_.value_width,
                                              0);
      }
    }
  }

  void store(int64_t b, int64_t n, const float* maximum, const float* sum, const Scratch& s) const {
    const int64_t index = call_.row_maximum.at(b, 0, n), step = call_.row_maximum.stride[1];
    float* row_maximum = static_cast<float*>(call_.row_maximum.data) + index;
    float* log2_sum = static_cast<float*>(call_.log2_sum.data) + index;
    const float sink = sink_of(call_, b, n);
    float factor[Heads::kMaxTokens];
    for (int64_t i = 0; i < call_.T; ++i) {
      const float reference = maximum[i] == kHidden ? 0.0f : maximum[i];
      const RowTotal total = total_of(sum[i], reference, sink);
      const bool empty = sum[i] == 0.0f;
      factor[i] = empty ? 0.0f : 1.0f / total.divisor;
      row_maximum[i * step] = empty ? 0.0f : total.maximum;
      log2_sum[i * step] = empty ? kEmptyRowLog2Sum : total.log2_sum;
    }
    store_head<Isa>(call_.out, b, n, {s.out, heads_.value_width, call_.T, call_.V},
                    [&](int64_t i) { return factor[i]; });
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const Heads heads_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
