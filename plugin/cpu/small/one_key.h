// Attention to one key, in float32. Its probability is 1 wherever it is seen, so the output is its
// value, dV is dO, and dQ and dK have only the part that the log-sum-exp's cotangent gives them.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/small/small_heads.h"

namespace jax_gluon::cpu {
namespace {

// Writes n elements of a row from `index` on: copies where they need no conversion.
template <class Isa>
void copy_row(const Result& out, int64_t index, const Operand& x, const void* row, int64_t n,
              float factor, float* scratch) {
  const int64_t size = static_cast<int64_t>(size_of(out.dtype));
  if (factor == 1.0f && out.dtype == x.dtype) {
    std::memcpy(static_cast<char*>(out.data) + index * size, row, static_cast<size_t>(n * size));
    return;
  }
  load_row<Isa>(row, x.dtype, n, scratch);
  store_row<Isa>(out, index, scratch, n, factor);
}

inline void clear_row(const Result& out, int64_t index, int64_t n) {
  const int64_t size = static_cast<int64_t>(size_of(out.dtype));
  std::memset(static_cast<char*>(out.data) + index * size, 0, static_cast<size_t>(n * size));
}

template <class Isa>
class OneKeyForward {
  static constexpr int64_t W = Isa::kLanes;
  using Heads = SmallHeads<Isa>;

 public:
  OneKeyForward(const AttentionForwardCall& call, Parallel& parallel)
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
  };

  void prepare(Scratch& s) const {
    if (s.memory.get()) return;
    Heads::lay_out(s.memory, {{&s.query, heads_.head_width},
                              {&s.key, heads_.head_width},
                              {&s.value, heads_.value_width}});
  }

  void attend(int64_t b, int64_t k, Range rows, Scratch& s) const {
    const Visibility visibility(call_, b);
    const float* key = float_row<Isa>(call_.key, b, 0, k, call_.H, s.key);
    const void* value = row_of(call_.value, b, 0, k);
    for (int64_t n = k * heads_.group; n < (k + 1) * heads_.group; ++n) {
      const typename Heads::Rules rules(call_, b, n);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const float* query = float_row<Isa>(call_.query, b, i, n, call_.H, s.query);
        const float product = dot<Isa>(query, key, heads_.head_width) * (call_.scale * kLog2E);
        const float x = logit(rules, visibility.of_row(i), i, product);
        const int64_t index = call_.row_maximum.at(b, i, n), row = call_.out.at(b, i, n);
        const bool seen = x != kHidden;
        // NaN where the logit is not finite.
        const float log2_sum = x - x;
        if (seen) {
          copy_row<Isa>(call_.out, row, call_.value, value, call_.V, log2_sum + 1.0f, s.value);
        } else {
          clear_row(call_.out, row, call_.V);
        }
        static_cast<float*>(call_.row_maximum.data)[index] = seen ? x : 0.0f;
        static_cast<float*>(call_.log2_sum.data)[index] = seen ? log2_sum : kEmptyRowLog2Sum;
      }
    }
  }

  static float logit(const typename Heads::Rules& rules, Range visible, int64_t i, float product) {
    if (!rules.any()) return visible.empty() ? kHidden : product;
    alignas(kAlignment) float scores[W] = {product};
    rules.apply(scores, i, 0, 0, W, visible);
    return scores[0];
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const Heads heads_;
  ScratchPool<Scratch> scratch_;
};

template <class Isa>
class OneKeyBackward {
  static constexpr int64_t W = Isa::kLanes;
  using Heads = SmallHeads<Isa>;

 public:
  OneKeyBackward(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call), parallel_(parallel), heads_(call), scratch_(parallel.threads()) {}

  void run() {
    heads_.run(
        parallel_, scratch_, false, [this](Scratch& s) { prepare(s); },
        [this](int64_t b, int64_t k, Range, Scratch& s) { differentiate(b, k, s); });
  }

 private:
  struct Scratch {
    Buffer<float> memory;
    float *query, *key, *value, *d_out;  // rows, padded with zeros
    float *d_key, *d_value;
    bool has_d_key;  // whether any row has a share in dK
  };

  void prepare(Scratch& s) const {
    if (s.memory.get()) return;
    const int64_t H = heads_.head_width, V = heads_.value_width;
    Heads::lay_out(
        s.memory,
        {{&s.query, H}, {&s.key, H}, {&s.value, V}, {&s.d_out, V}, {&s.d_key, H}, {&s.d_value, V}});
  }

  void differentiate(int64_t b, int64_t k, Scratch& s) const {
    const int64_t rows = call_.T * heads_.group;
    const int64_t at_key = call_.d_key.at(b, 0, k), at_value = call_.d_value.at(b, 0, k);
    const float* value = float_row<Isa>(call_.value, b, 0, k, call_.V, s.value);
    s.has_d_key = false;
    if (rows > 1) std::fill(s.d_value, s.d_value + heads_.value_width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r / heads_.group, n = k * heads_.group + r % heads_.group;
      const float log2_sum = scalar_of(call_.log2_sum, b, i, n);
      if (log2_sum == kEmptyRowLog2Sum) {
        clear_row(call_.d_query, call_.d_query.at(b, i, n), call_.H);
        if (rows == 1) clear_row(call_.d_value, at_value, call_.V);
        continue;
      }
      const float p = log2_sum - log2_sum + 1.0f;  // NaN where the logit is not finite
      const float* d_out = float_row<Isa>(call_.d_out, b, i, n, call_.V, s.d_out);
      if (rows == 1) {
        copy_row<Isa>(call_.d_value, at_value, call_.d_out, row_of(call_.d_out, b, i, n), call_.V,
                      p, s.d_out);
      } else {
        add_row(p, d_out, heads_.value_width, s.d_value);
      }
      // Of dP - D only what is not finite is left: D is dP.
      const float d_p = dot<Isa>(d_out, value, heads_.value_width);
      add_d_score(p * (d_p - d_p + d_logit(b, i, n)), b, i, n, s);
    }
    if (rows > 1) store_row<Isa>(call_.d_value, at_value, s.d_value, call_.V, 1.0f);
    if (s.has_d_key) {
      store_row<Isa>(call_.d_key, at_key, s.d_key, call_.H, call_.scale);
    } else {
      clear_row(call_.d_key, at_key, call_.H);
    }
  }

  // What the cotangent of the log-sum-exp hands to the logit before the soft cap.
  float d_logit(int64_t b, int64_t i, int64_t n) const {
    const float d = call_.d_log_sum_exp ? scalar_of(call_.d_log_sum_exp, b, i, n) : 0.0f;
    if (d == 0.0f || call_.soft_cap == 0.0f) return d;
    // The row's maximum is its one logit, in base 2.
    const float t = scalar_of(call_.row_maximum, b, i, n) / (call_.soft_cap * kLog2E);
    return d * (1.0f - t * t);
  }

  // dQ of a row, and its share of dK. Without a cotangent of the log-sum-exp both are zeros.
  void add_d_score(float d_score, int64_t b, int64_t i, int64_t n, Scratch& s) const {
    const int64_t index = call_.d_query.at(b, i, n);
    if (d_score == 0.0f) {
      clear_row(call_.d_query, index, call_.H);
      return;
    }
    if (!s.has_d_key) {
      load_finite(call_.key, b, 0, n / heads_.group, s.key);
      std::fill(s.d_key, s.d_key + heads_.head_width, 0.0f);
      s.has_d_key = true;
    }
    load_finite(call_.query, b, i, n, s.query);
    store_row<Isa>(call_.d_query, index, s.key, call_.H, d_score * call_.scale);
    add_row(d_score, s.query, heads_.head_width, s.d_key);
  }

  // Row (b, i, n) of H elements, 0 where it is not finite: dS, which meets it, is NaN then.
  void load_finite(const Operand& x, int64_t b, int64_t i, int64_t n, float* out) const {
    load_row<Isa>(row_of(x, b, i, n), x.dtype, call_.H, out);
    if (!all_finite<Isa>(out, heads_.head_width)) replace_nonfinite(out, call_.H);
  }

  static void add_row(float factor, const float* x, int64_t width, float* out) {
    const auto f = Isa::set1(factor);
    for (int64_t h = 0; h < width; h += W) {
      Isa::store(out + h, Isa::fma(Isa::load(x + h), f, Isa::load(out + h)));
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  const Heads heads_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
