// Attention forward of few queries over few keys, in float32.
#pragma once

#include <cmath>

#include "cpu/rows/quantized_rows.h"
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
                              {&s.key, S * H},
                              {&s.value, S * V},
                              {&s.key_columns, heads_.columns_size(call_.H)},
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
    bool finite = true;
    for (int64_t j = 0; j < S; ++j) {
      float* value = s.value + j * heads_.value_width;
      load_row<Isa>(row_of(call_.key, b, j, k), call_.key.dtype, call_.H,
                    s.key + j * heads_.head_width);
      load_row<Isa>(row_of(call_.value, b, j, k), call_.value.dtype, call_.V, value);
      finite &= all_finite<Isa>(value, heads_.value_width);
    }
    heads_.to_columns(s.key, heads_.head_width, call_.H, s.key_columns);
    for (int64_t n = k * heads_.group; n < (k + 1) * heads_.group; ++n) {
      const Rules rules(call_, b, n);
      for (int64_t i = 0; i < T; ++i) {
        float* query = s.query + i * heads_.head_width;
        load_row<Isa>(row_of(call_.query, b, i, n), call_.query.dtype, call_.H, query);
        scale_row<Isa>(query, heads_.head_width, call_.scale * kLog2E);
      }
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
        SmallProduct<Isa>::run({s.scores, heads_.columns, 1}, T, s.value, heads_.value_width,
                               heads_.value_width, S, s.out, heads_.value_width);
      } else {
        add_seen_values(s);
      }
      for (int64_t i = 0; i < T; ++i) store(b, i, n, maximum[i], sum[i], s);
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
        SmallProduct<Isa>::template run<true>({&p, 0, 0}, 1, s.value + j * heads_.value_width, 0,
                                              heads_.value_width, 1, s.out + i * heads_.value_width,
                                              0);
      }
    }
  }

  void store(int64_t b, int64_t i, int64_t n, float maximum, float sum, const Scratch& s) const {
    const int64_t index = (b * call_.T + i) * call_.N + n;
    const bool empty = sum == 0.0f;
    store_row<Isa>(call_.out, index * call_.V, s.out + i * heads_.value_width, call_.V,
                   empty ? 0.0f : 1.0f / sum);
    static_cast<float*>(call_.row_maximum.data)[index] = maximum == kHidden ? 0.0f : maximum;
    static_cast<float*>(call_.log2_sum.data)[index] = empty ? kEmptyRowLog2Sum : std::log2(sum);
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const Heads heads_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
