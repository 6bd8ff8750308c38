// Attention of a few queries over many keys, all of them codes: products in integers. Queries are
// rounded to 8 bits after the scales of keys that lie along the product were folded into them, and
// so are the probabilities times the scales of the values. Rows are read in the order in which they
// lie in memory, all heads of a token side by side, and the softmax of many heads takes place in
// the lanes of a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/decode/code_products.h"
#include "cpu/decode/code_weights.h"
#include "cpu/decode/decode_queries.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class DecodeCodes {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using Queries = DecodeQueries<Isa>;
  using Weights = CodeWeights<Isa>;
  static constexpr int64_t W = Isa::kLanes;
  // Keys of a subtile, against whose largest probability the others are rounded: fewer where the
  // integers are smaller.
  static constexpr int64_t kSubtile = Weights::kMaxKeys, kShortSubtile = 16, kChunk = 512;
  // Keys and values that the second cache is taken to hold.
  static constexpr int64_t kCachedBytes = 512 * 1024;
  using Rules = LogitRules<Isa, kSubtile>;

 public:
  DecodeCodes(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        queries_(call, parallel, kChunk, 8 * W, Weights::groups_of(call)),
        weights_(call, queries_),
        subtile_(call.value.quantization.bits == 8 && Isa::kMaxWeight < 255 ? kShortSubtile
                                                                            : kSubtile),
        streams_(call.S * call.K * (row_bytes(call.key, call.H) + row_bytes(call.value, call.V)) >
                 kCachedBytes),
        scratch_(parallel.threads()) {}

  // Where all operands are codes and no scale but those of the keys lies along a product.
  static bool takes(const AttentionForwardCall& call) {
    const Quantization& key = call.key.quantization;
    if (!call.query.quantization || !key || !call.value.quantization) return false;
    const bool is_shared =
        key.head_block == 0 || key.token_block == 0 || key.token_block >= Queries::kMinSharingKeys;
    return is_shared && Weights::takes(call);
  }

  void run() {
    queries_.run([this](int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
      with_codes(call_.key, [&](auto key) {
        with_codes(call_.value, [&](auto value) {
          attend<decltype(key), decltype(value)>(b, chunk, visibility, keys);
        });
      });
    });
  }

 private:
  struct Scratch : Queries::Scratch {
    Buffer<int8_t> codes;        // [all rows][head width], in the order of the stored codes
    Buffer<float> code_scale;    // [padded rows]
    Buffer<int32_t> bias;        // [padded rows]: of the products
    Buffer<int64_t> key_of_row;  // byte of the key's head in its token
    Buffer<float> scores;        // [kSubtile][padded rows]: scores, then probabilities
    Buffer<float> key_scale, key_offset;  // [kSubtile][padded rows]
    Buffer<char> gathered;                // [kSubtile] tokens of values, of several pages
    typename Weights::Scratch weights;
  };

  void prepare(Scratch& s) const {
    const int64_t padded = queries_.padded_rows;
    queries_.prepare(s);
    weights_.prepare(s.weights);
    s.codes.allocate(queries_.all_rows * queries_.head_width);
    s.code_scale.allocate(padded);
    s.bias.allocate(padded);
    std::fill(s.code_scale.get(), s.code_scale.get() + padded, 0.0f);
    std::fill(s.bias.get(), s.bias.get() + padded, 0);
    s.key_of_row.allocate(queries_.all_rows);
    for (Buffer<float>* each : {&s.scores, &s.key_scale, &s.key_offset}) {
      each->allocate(kSubtile * padded + W);  // read in whole vectors from any row
    }
    if (call_.page_tokens != 0) s.gathered.allocate(kSubtile * token_bytes(call_.value));
  }

  template <class Function>
  static void with_codes(const Operand& x, Function f) {
    if (x.dtype == DType::kU4x2) return f(CodeProducts<Isa, true>());
    f(CodeProducts<Isa, false>());
  }
  // From one head to the next, in bytes.
  static int64_t head_step(const Operand& x) {
    return x.stride[1] * static_cast<int64_t>(size_of(x.dtype));
  }
  // From one token to the next.
  static int64_t token_bytes(const Operand& x) {
    return x.stride[0] * static_cast<int64_t>(size_of(x.dtype));
  }
  static const char* token(const Operand& x, int64_t b, int64_t j, int64_t k) {
    return static_cast<const char*>(row_of(x, b, j, k));
  }

  template <class Key, class Value>
  void attend(int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    for (int64_t i = 0; i < queries_.all_rows; ++i) load_query<Key>(b, i, s);
    for (int64_t j = keys.begin; j < keys.end; j += subtile_) {
      const Range subtile{j, std::min(j + subtile_, keys.end)};
      find_scores<Key>(b, subtile, s);
      apply_rules(visibility, b, subtile, s);
      find_probabilities(subtile, s);
      weights_.template weigh<Value>(b, subtile, {s.scores.get(), s.offsets.get()}, s.weights);
      add_values<Value>(b, subtile, keys.end, s);
    }
    queries_.template store<Value>(b, chunk, s);
  }

  // Query i as codes, unless scales of keys are folded into it first.
  template <class Key>
  void load_query(int64_t b, int64_t i, Scratch& s) const {
    queries_.template load_query<Key>(b, i, s);
    s.key_of_row[i] = i / queries_.head_rows * head_step(call_.key);
    if (call_.key.quantization.head_block != 0 || take_query<Key>(b, i, s)) return;
    round_query<Key>(s.query.get() + i * queries_.head_width, i, s);
  }

  // The stored codes of row i of the queries, if they are all that it is made of.
  template <class Key>
  bool take_query(int64_t b, int64_t i, Scratch& s) const {
    const Quantization& q = call_.query.quantization;
    if (q.head_block != 0 || q.offset || q.center) return false;
    int8_t* codes = s.codes.get() + i * queries_.head_width;
    std::fill(codes, codes + queries_.head_width, static_cast<int8_t>(0));
    const int64_t t = queries_.query_of(i), n = queries_.head_of(i);
    int8_t* unpacked = reinterpret_cast<int8_t*>(s.folded.get());
    const ScaledCodes stored =
        QuantizedRow<Isa>::codes_of(call_.query, b, t, n, call_.H, s.row.get(), unpacked);
    int32_t sum = 0;
    for (int64_t h = 0; h < call_.H; ++h) {
      codes[Key::query_position(h)] = stored.codes[h];
      sum += stored.codes[h];
    }
    s.code_scale[i] = stored.scale.scale * (call_.scale * kLog2E);
    s.bias[i] = -Key::kKeyBias * sum;
    return true;
  }

  // Codes of row i of the queries, and what one of them is worth: NaN where an element is not
  // finite.
  template <class Key>
  void round_query(const float* query, int64_t i, Scratch& s) const {
    const int64_t width = round_up(call_.H, Key::kStep);
    const float largest = QuantizedRow<Isa>::largest_magnitude(query, width);
    const float unit = largest / 127.0f;
    const bool some = unit >= std::numeric_limits<float>::min();
    const F inverse = Isa::set1(some ? 1.0f / unit : 0.0f);
    int8_t* codes = s.codes.get() + i * queries_.head_width;
    I sum = Isa::set1_i32(0);
    for (int64_t h = 0; h < width; h += W) {
      const I code = Isa::to_int(Isa::mul(Isa::load(query + h), inverse));
      Isa::store_s8(codes + h, code);
      sum = Isa::add_i32(sum, code);
    }
    s.code_scale[i] = some || largest != largest ? unit : 0.0f;
    // Codes of what is not finite are none, and their sum may be no int32.
    const float total = std::isfinite(largest) ? Isa::reduce_add(Isa::to_float(sum)) : 0.0f;
    s.bias[i] = -Key::kKeyBias * static_cast<int32_t>(total);
  }

  template <class Key>
  void find_scores(int64_t b, Range keys, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    if (q.head_block == 0) {
      dot_tokens<Key>(b, keys, s.scores.get(), s);
      scale_scores(b, keys, s);
      return;
    }
    queries_.each_run(keys, [&](Range run) {
      fold_scales<Key>(b, run.begin, s);
      const int64_t first = run.begin - keys.begin;
      float* scores = s.scores.get() + first * queries_.padded_rows;
      dot_tokens<Key>(b, run, scores, s);
      for (int64_t k = 0; k < call_.K; ++k) {
        queries_.apply_powers(b, run, k, scores + k * queries_.head_rows, 1, queries_.padded_rows);
      }
    });
  }

  template <class Key>
  void fold_scales(int64_t b, int64_t j, Scratch& s) const {
    for (int64_t i = 0; i < queries_.all_rows; ++i) {
      const int64_t r = i % queries_.head_rows;
      if (r == 0) queries_.template fold_scales<Key>(b, j, i / queries_.head_rows, s);
      round_query<Key>(s.folded.get() + r * queries_.head_width, i, s);
    }
  }

  // Products of all rows with `keys`.
  template <class Key>
  void dot_tokens(int64_t b, Range keys, float* scores, Scratch& s) const {
    Key::with_steps(row_bytes(call_.key, call_.H), [&](auto steps) {
      for (int64_t j = keys.begin; j < keys.end; ++j, scores += queries_.padded_rows) {
        ask_for_token(call_.value, b, j, call_.V);
        dot_token<Key, decltype(steps)::value>(token(call_.key, b, j, 0), scores, s);
      }
    });
  }

  // The rows of all heads.
  void ask_for_token(const Operand& x, int64_t b, int64_t j, int64_t width) const {
    if (streams_) ask_for_heads(x, b, j, call_.K, width);
  }

  template <class Key, int kSteps>
  void dot_token(const char* heads, float* scores, Scratch& s) const {
    const int64_t rows = queries_.all_rows, width = queries_.head_width;
    const int64_t bytes = row_bytes(call_.key, call_.H);
    const int64_t* key_of_row = s.key_of_row.get();
    const int8_t* codes = s.codes.get();
    int64_t i = 0;
    for (; i + W <= rows; i += W, codes += W * width) {
      I acc[W];
      JAX_GLUON_UNROLL
      for (int64_t e = 0; e < W; ++e) {
        acc[e] = Key::template dot<kSteps>(heads + key_of_row[i + e], codes + e * width, bytes);
      }
      store_scores<Key>(acc, i, scores, s);
    }
    if (i == rows) return;
    I acc[W];
    for (int64_t e = 0; e < W; ++e) {
      acc[e] = i + e < rows
                   ? Key::template dot<kSteps>(heads + key_of_row[i + e], codes + e * width, bytes)
                   : Isa::set1_i32(0);
    }
    store_scores<Key>(acc, i, scores, s);
  }

  // Scores of W rows from the lanes of their products.
  template <class Key>
  JAX_GLUON_INLINE void store_scores(const I* acc, int64_t first, float* scores, Scratch& s) const {
    const I product = Isa::add_i32(Isa::sum_each(acc), Isa::load_i32(s.bias.get() + first));
    const F scale = Isa::load(s.code_scale.get() + first);
    const F constant = Isa::load(s.constant.get() + first);
    Isa::store(scores + first, Isa::fma(Isa::to_float(product), scale, constant));
  }

  // One scale, and perhaps an offset, for each row of keys.
  void scale_scores(int64_t b, Range keys, Scratch& s) const {
    const bool has_offsets =
        load_scales_of_rows(queries_, call_.key, b, keys, s.key_scale.get(), s.key_offset.get());
    const int64_t padded = queries_.padded_rows;
    for (int64_t j = 0; j < (keys.end - keys.begin) * padded; j += padded) {
      for (int64_t i = 0; i < padded; i += W) {
        float* at = s.scores.get() + j + i;
        F score = Isa::mul(Isa::load(at), Isa::load(s.key_scale.get() + j + i));
        if (has_offsets) {
          const F offset = Isa::load(s.key_offset.get() + j + i);
          score = Isa::fma(offset, Isa::load(s.query_sum.get() + i), score);
        }
        Isa::store(at, score);
      }
    }
  }

  // Bias, soft cap and masks, for rows that have any.
  void apply_rules(const Visibility& visibility, int64_t b, Range keys, Scratch& s) const {
    const bool all_have = Rules(call_, b, 0).any();
    alignas(kAlignment) float row[kSubtile];
    const int64_t count = keys.end - keys.begin, whole = round_up(count, W);
    for (int64_t i = 0; i < queries_.all_rows; ++i) {
      const int64_t query = queries_.query_of(i);
      const Range visible = visibility.of_row(query);
      if (!all_have && visible.begin <= keys.begin && keys.end <= visible.end) continue;
      float* scores = s.scores.get() + i;
      const int64_t step = queries_.padded_rows;
      const float center = needs_whole_logits(call_) ? s.center[i] : 0.0f;
      std::fill(row, row + whole, 0.0f);
      for (int64_t j = 0; j < count; ++j) row[j] = scores[j * step] + center;
      Rules(call_, b, queries_.head_of(i))
          .apply(row, query, keys.begin, 0, whole,
                 {visible.begin, std::min(visible.end, keys.end)});
      for (int64_t j = 0; j < count; ++j) scores[j * step] = row[j];
    }
  }

  // Scores to probabilities relative to each row's running maximum; what was summed before is
  // rescaled.
  void find_probabilities(Range keys, Scratch& s) const {
    const int64_t padded = queries_.padded_rows, end = (keys.end - keys.begin) * padded;
    const F hidden = Isa::set1(kHidden);
    for (int64_t i = 0; i < padded; i += W) {
      float* scores = s.scores.get() + i;
      const F before = Isa::load(s.maximum.get() + i);
      F now = before;
      for (int64_t j = 0; j < end; j += padded) now = Isa::max(Isa::load(scores + j), now);
      const F reference = Isa::where_less(hidden, now, now, Isa::zero());
      const F rescale = Isa::template exp2<5>(Isa::sub(before, reference));
      F sum = Isa::mul(Isa::load(s.sum.get() + i), rescale);
      for (int64_t j = 0; j < end; j += padded) {
        const F p = Isa::template exp2<5>(Isa::sub(Isa::load(scores + j), reference));
        Isa::store(scores + j, p);
        sum = Isa::add(sum, p);
      }
      Isa::store(s.sum.get() + i, sum);
      Isa::store(s.maximum.get() + i, now);
      float factors[W];
      Isa::store(factors, rescale);
      for (int64_t lane = 0; lane < W && i + lane < queries_.all_rows; ++lane) {
        if (factors[lane] != 1.0f) queries_.rescale(i + lane, factors[lane], s);
      }
    }
  }

  // The values of a subtile, all heads of a token side by side: in place, or copied where they are
  // on several pages. They are as far apart, since sums are rounded where that says so.
  const char* values_of(int64_t b, Range keys, Scratch& s) const {
    int64_t end = end_of_piece(call_.value, keys.begin, keys.end);
    if (end == keys.end) return token(call_.value, b, keys.begin, 0);
    const int64_t bytes = token_bytes(call_.value);
    char* to = s.gathered.get();
    for (int64_t j = keys.begin; j < keys.end; end = end_of_piece(call_.value, j, keys.end)) {
      const auto size = static_cast<size_t>((end - j) * bytes);
      std::memcpy(to, token(call_.value, b, j, 0), size);
      to += size;
      j = end;
    }
    return s.gathered.get();
  }

  template <class Value>
  void add_values(int64_t b, Range keys, int64_t end, Scratch& s) const {
    const int64_t bytes = row_bytes(call_.value, call_.V), width = queries_.value_width;
    const char* values = values_of(b, keys, s);
    for (int64_t k = 0; k < call_.K; ++k) {
      const StoredRows rows{values + k * head_step(call_.value), token_bytes(call_.value),
                            keys.end - keys.begin};
      float* out = s.out.get() + k * queries_.head_rows * width;
      // The next keys, some for each head.
      const int64_t next = keys.end + k * subtile_ / call_.K;
      const int64_t stop = std::min(end, keys.end + (k + 1) * subtile_ / call_.K);
      for (int64_t j = next; j < stop; ++j) ask_for_token(call_.key, b, j, call_.H);
      Value::add_rows(rows, bytes, weights_.of_head(k, s.weights), queries_.head_rows, out, width);
    }
  }

  const AttentionForwardCall& call_;
  Queries queries_;
  const Weights weights_;
  const int64_t subtile_;
  const bool streams_;  // whether rows are asked for before they are read
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
