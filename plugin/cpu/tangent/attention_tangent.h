// Attention and its derivative along tangents of the operands, in one pass over the keys.
//
// Of a row with logits x and their tangents dx: P = softmax(x), mu = sum P dx is the tangent of the
// log-sum-exp, and that of the output is sum P ((dx - mu) v + dv). An online softmax keeps,
// relative to the largest logit so far, the sums of p, p dx, p v and p (dx v + dv); the mean mu is
// taken out at the end. Dropout weighs the sums of values alone.
#pragma once

#include <algorithm>

#include "cpu/forward/forward_rows.h"
#include "cpu/forward/row_group.h"
#include "cpu/forward/subtile_softmax.h"
#include "cpu/rows/sink.h"
#include "cpu/tangent/tangent_key_values.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class AttentionTangent {
  using Core = F32Core<Isa>;
  using KeyValues = TangentKeyValues<Isa>;
  static constexpr int64_t R = Core::kTileRows, C = Core::kTileColumns, W = Isa::kLanes;
  static constexpr int64_t kGroupRows = Core::kGroupRows, kKeys = KeyValues::kKeys;
  static constexpr int64_t kStride = 2 * kKeys;  // of rows of scores
  using Rules = LogitRules<Isa, kKeys>;
  using Softmax = SubtileSoftmax<Core>;
  using Group = RowGroup<Isa, Rules>;
  static constexpr int64_t kTaskBlocks = 2;  // of rows: more leave no room for keys in L2
  // Kv heads are packed some at a time: up to this many floats, which stay in the cache, or one for
  // each thread.
  static constexpr int64_t kPackedSize = int64_t{1} << 20;

 public:
  AttentionTangent(const AttentionTangentCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        value_panels_(ceil_div(call.V, C)),
        value_columns_(value_panels_ * C),
        row_blocks_(ceil_div(call.T, kBlockRows)),
        product_lanes_(call.H * ((call.query_tangent ? 1 : 0) + (call.key_tangent ? 1 : 0))),
        moves_logits_(product_lanes_ != 0 || call.bias_tangent),
        key_values_(call, true),
        packed_(call, key_values_),
        mask_tiles_(call),
        rows_(call, key_values_),
        scratch_(parallel.threads()) {}

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    mask_tiles_.find(parallel_);
    const int64_t heads = call_.B * call_.K;
    const int64_t slots = std::min(
        heads,
        std::max(parallel_.threads(), kPackedSize / std::max<int64_t>(packed_.slot_size(), 1)));
    packed_.allocate(slots);
    for (int64_t first = 0; first < heads; first += slots) {
      run_heads(first, std::min(first + slots, heads));
    }
  }

 private:
  // kBlockRows rows of a query head.
  struct RowBlock {
    Range rows;
    Buffer<float> query, tangent;      // row tiles: of logits, and of their tangents
    Buffer<float> sums, tangent_sums;  // [kBlockRows][W]: of p and of p dx
    Buffer<float> out, tangent_out;    // [kBlockRows][value_columns]: sums of p v, of p (dx v + dv)
  };

  struct Scratch {
    RowScratch<Core> load;
    typename KeyValues::Scratch key_values;
    RowBlock blocks[kTaskBlocks];
    Buffer<float> rows;    // queries of a tile beside their tangents
    Buffer<float> scores;  // [kGroupRows][logits, tangents][kKeys]; then p and p dx
    Buffer<typename Softmax::Group> group;
  };

  // Where keys are packed, and the first of a block.
  struct Keys {
    int64_t b, k, slot, first;
  };

  void prepare(Scratch& s) const {
    s.load.prepare(call_);
    s.key_values.row.allocate(call_.V);
    s.key_values.tangent_row.allocate(call_.V);
    s.rows.allocate(R * product_lanes_);
    s.scores.allocate(kGroupRows * kStride);
    s.group.allocate(1);
    s.group[0] = {};
  }

  void prepare(RowBlock& block) const {
    block.query.allocate(kBlockRows * call_.H);
    block.tangent.allocate(kBlockRows * product_lanes_);
    const auto zero = [](Buffer<float>& x, int64_t width) {
      x.allocate(kBlockRows * width);
      std::fill(x.get(), x.get() + kBlockRows * width, 0.0f);
    };
    zero(block.sums, W);
    zero(block.tangent_sums, W);
    zero(block.out, value_columns_);
    zero(block.tangent_out, value_columns_);
  }

  // Kv heads [first, last), those of all slots.
  void run_heads(int64_t first, int64_t last) {
    const int64_t blocks = packed_.blocks(), group = call_.N / call_.K;
    parallel_.run((last - first) * blocks, [&](int64_t task) {
      auto lease = scratch_.acquire();
      packed_.pack(first + task / blocks, task / blocks, task % blocks, lease->key_values);
    });
    // Where that leaves each thread some tasks, one has several blocks of rows: keys and values
    // come from beyond the cache once for all of them.
    const int64_t heads = (last - first) * group;
    const bool is_large = heads * row_blocks_ >= 4 * kTaskBlocks * parallel_.threads();
    const int64_t task_blocks = is_large ? kTaskBlocks : 1;
    const int64_t tasks = ceil_div(row_blocks_, task_blocks);
    parallel_.run(heads * tasks, [&](int64_t task) {
      const int64_t slot = task / tasks / group, head = first + slot;
      const int64_t n = head % call_.K * group + task / tasks % group;
      // Last rows first: with causal masking they are the longest.
      const int64_t begin = (tasks - 1 - task % tasks) * task_blocks * kBlockRows;
      attend({head / call_.K, head % call_.K, slot, 0}, n,
             {begin, std::min(call_.T, begin + task_blocks * kBlockRows)});
    });
  }

  void attend(Keys keys, int64_t n, Range rows) {
    const int64_t b = keys.b;
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n, mask_tiles_.plane(b, n));
    const BiasRows<Isa> bias_tangent(call_, call_.bias_tangent, b, n);
    const DropoutRow<Isa> dropout(call_, b, n);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);

    RowState states[kTaskBlocks];
    const int64_t blocks = ceil_div(rows.end - rows.begin, kBlockRows);
    for (int64_t u = 0; u < blocks; ++u) {
      RowBlock& block = s.blocks[u];
      const int64_t begin = rows.begin + u * kBlockRows;
      block.rows = {begin, std::min(begin + kBlockRows, rows.end)};
      prepare(block);
      rows_.load(b, n, block.rows, s.load, block.query.get(), states[u]);
      load_tangents(b, n, block, s);
    }
    const Range visible = visibility.of_rows(rows);
    for (keys.first = visible.begin / kKeys * kKeys; keys.first < visible.end;
         keys.first += kKeys) {
      for (int64_t i = rows.begin; i < rows.end;) {
        const int64_t u = (i - rows.begin) / kBlockRows;
        RowBlock& block = s.blocks[u];
        const Range queries{i, std::min(i + kGroupRows, block.rows.end)};
        const Group group{visibility, rules, dropout, queries, i - block.rows.begin, states[u]};
        i = queries.end;
        const Range seen = intersect(visibility.of_rows(queries), {keys.first, keys.first + kKeys});
        for (Range run = rules.first_run(queries, seen, C); !run.empty();
             run = rules.first_run(queries, {run.end, seen.end}, C)) {
          attend_group(group, bias_tangent, keys, {run.begin - keys.first, run.end - keys.first},
                       block, s);
        }
      }
    }
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t u = (i - rows.begin) / kBlockRows;
      store(b, n, i, i - s.blocks[u].rows.begin, states[u], s.blocks[u]);
    }
  }

  // Row tiles of [dq, q], whose products with [k, dk] are the tangents of q k.
  void load_tangents(int64_t b, int64_t n, RowBlock& block, Scratch& s) const {
    const Range rows = block.rows;
    const int64_t H = call_.H, lanes = product_lanes_;
    if (lanes == 0) return;
    if (call_.query_tangent) touch_rows(call_.query_tangent, b, rows.begin, rows.end, n, H);
    for (int64_t t = 0; t < round_up(rows.end - rows.begin, kGroupRows); t += R) {
      for (int64_t r = 0; r < R; ++r) {
        float* out = s.rows.get() + r * lanes;
        const int64_t i = rows.begin + t + r;
        if (i >= rows.end) {
          std::fill(out, out + lanes, 0.0f);
          continue;
        }
        if (const Operand& x = call_.query_tangent) {
          load_row<Isa>(row_of(x, b, i, n), x.dtype, H, out);
        }
        if (call_.key_tangent) {
          QuantizedRow<Isa>::load_uncentered(call_.query, b, i, n, H, out + lanes - H);
        }
        scale_row<Isa>(out, lanes, call_.scale);
      }
      interleave<Isa, R>(s.rows.get(), lanes, lanes, block.tangent.get() + t * lanes);
    }
  }

  // `seen`: the columns of the block that any row of the group sees.
  void attend_group(const Group& group, const BiasRows<Isa>& bias_tangent, const Keys& keys,
                    Range seen, RowBlock& block, Scratch& s) const {
    const int64_t H = call_.H;
    const Range columns{seen.begin / C * C, round_up(seen.end, C)};
    for (int64_t j = columns.begin; j < columns.end; j += C) {
      const float* panel = packed_.key_panels(keys.slot, keys.first + j);
      for (int64_t t = 0; t < kGroupRows; t += R) {
        float* scores = s.scores.get() + t * kStride + j;
        score_tile<Core>(block.query.get() + (group.first + t) * H, panel, H, scores, kStride);
        if (product_lanes_ == 0) continue;
        score_tile<Core>(block.tangent.get() + (group.first + t) * product_lanes_,
                         call_.query_tangent ? panel : panel + H * C, product_lanes_,
                         scores + kKeys, kStride);
      }
    }
    for (int64_t r = 0; r < group.count(); ++r) {
      find_probabilities(group, r, bias_tangent, keys, columns, s);
    }
    Softmax::finish(group.state.maximum + group.first, block.sums.get() + group.first * W,
                    block.tangent_sums.get() + group.first * W, s.group[0]);
    if (group.dropout.any()) drop(group, keys, columns, s.scores.get());
    multiply_values(group, keys, columns, block, s);
    add_unpacked_values(group, keys, seen, block, s);
  }

  // Of row r of the group: p and p dx, in place of products.
  void find_probabilities(const Group& group, int64_t r, const BiasRows<Isa>& bias_tangent,
                          const Keys& keys, Range columns, Scratch& s) const {
    const int64_t begin = columns.begin, end = columns.end, i = group.rows.begin + r;
    const Range visible = group.visible(r), all{keys.first + begin, keys.first + end};
    float* logits = s.scores.get() + r * kStride;
    float* tangents = logits + kKeys;
    alignas(kAlignment) float slope[kKeys];
    if (group.rules.any(group.rows, all) || !contains(visible, all)) {
      group.rules.apply(logits, i, keys.first, begin, end, visible, slope);
    }
    const float* maximum = group.state.maximum + group.first + r;
    Softmax::template run_row<false>({logits + begin, logits + begin, nullptr, maximum, nullptr},
                                     end - begin, r, s.group[0]);
    if (!moves_logits_) return;
    if (bias_tangent) add_bias(bias_tangent, i, all, intersect(all, visible), tangents + begin);
    if (call_.soft_cap != 0.0f) {
      for (int64_t j = begin; j < end; j += W) {
        Isa::store(tangents + j, Isa::mul(Isa::load(tangents + j), Isa::load(slope + j)));
      }
    }
    auto sum = Isa::zero();
    for (int64_t j = begin; j < end; j += W) {
      // Hidden keys have p = 0 exactly; their tangents may be NaN.
      const auto p = Isa::load(logits + j);
      const auto x = Isa::where_nonzero(p, Isa::mul(p, Isa::load(tangents + j)));
      sum = Isa::add(sum, x);
      Isa::store(tangents + j, x);
    }
    Isa::store(s.group[0].offset_sums + r * W, sum);
  }

  // Adds the tangents of the bias to those of products, of the keys of `all`.
  void add_bias(const BiasRows<Isa>& bias_tangent, int64_t i, Range all, Range visible,
                float* tangents) const {
    alignas(kAlignment) float bias[kKeys];
    bias_tangent.read(i, visible, all.begin, all.end, bias);
    for (int64_t j = 0; j < all.end - all.begin; j += W) {
      const auto products = product_lanes_ == 0 ? Isa::zero() : Isa::load(tangents + j);
      Isa::store(tangents + j, Isa::add(products, Isa::load(bias + j)));
    }
  }

  void drop(const Group& group, const Keys& keys, Range columns, float* scores) const {
    uint8_t scratch[DropoutRow<Isa>::bytes(kKeys)];
    const int64_t count = columns.end - columns.begin;
    for (int64_t r = 0; r < group.count(); ++r) {
      const uint8_t* keep = group.dropout.find(group.rows.begin + r, keys.first + columns.begin,
                                               keys.first + columns.end, scratch);
      float* row = scores + r * kStride + columns.begin;
      zero_dropped<Isa>(keep, count, row);
      if (moves_logits_) zero_dropped<Isa>(keep, count, row + kKeys);
    }
  }

  // Adds p v, and p dx v + p dv, of `columns`. Of a whole block, [p, p dx] times [dv, v] is one
  // product.
  void multiply_values(const Group& group, const Keys& keys, Range columns, RowBlock& block,
                       Scratch& s) const {
    const int64_t begin = columns.begin, count = columns.end - begin;
    const bool has_tangent = static_cast<bool>(call_.value_tangent);
    const bool is_whole = has_tangent && moves_logits_ && count == kKeys;
    alignas(kAlignment) float ones[kGroupRows];
    std::fill(ones, ones + kGroupRows, 1.0f);
    for (int64_t p = 0; p < value_panels_; ++p) {
      const float* tangents = packed_.value_panel(keys.slot, keys.first / kKeys, p) + begin * C;
      const float* values = tangents + packed_.value_offset();
      for (int64_t t = 0; t < kGroupRows; t += R) {
        const float* row = s.scores.get() + t * kStride + begin;
        const int64_t at = (group.first + t) * value_columns_ + p * C;
        const float* factor = s.group[0].rescale + t;
        multiply(row, values, count, block.out.get() + at, factor);
        if (is_whole) {
          multiply(row, tangents, 2 * count, block.tangent_out.get() + at, factor);
          continue;
        }
        if (has_tangent) multiply(row, tangents, count, block.tangent_out.get() + at, factor);
        if (moves_logits_) {
          multiply(row + kKeys, values, count, block.tangent_out.get() + at,
                   has_tangent ? ones + t : factor);
        }
      }
    }
  }
  void multiply(const float* p, const float* panel, int64_t keys, float* out,
                const float* factor) const {
    value_tile<Core, kStride>(p, panel, keys, out, value_columns_, factor);
  }

  // Of the keys whose values are packed as zeros.
  void add_unpacked_values(const Group& group, const Keys& keys, Range columns, RowBlock& block,
                           Scratch& s) const {
    const uint8_t* has_zeros = packed_.has_zeros(keys.slot, keys.first);
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      if (!has_zeros[c]) continue;
      packed_.load_values(keys.b, keys.first + c, keys.k, s.key_values);
      for (int64_t r = 0; r < group.count(); ++r) {
        const float* row = s.scores.get() + r * kStride + c;
        const float p = row[0], moved = moves_logits_ ? row[kKeys] : 0.0f;
        if (p == 0.0f) continue;
        float* out = block.out.get() + (group.first + r) * value_columns_;
        float* tangent_out = block.tangent_out.get() + (group.first + r) * value_columns_;
        for (int64_t v = 0; v < call_.V; ++v) {
          out[v] += p * s.key_values.row[v];
          if (moves_logits_) tangent_out[v] += moved * s.key_values.row[v];
          if (call_.value_tangent) tangent_out[v] += p * s.key_values.tangent_row[v];
        }
      }
    }
  }

  // Writes row i of query head n, row r of its block.
  void store(int64_t b, int64_t n, int64_t i, int64_t r, RowState& state, RowBlock& block) const {
    float* out = block.out.get() + r * value_columns_;
    float* tangent = block.tangent_out.get() + r * value_columns_;
    state.sum[r] = Isa::reduce_add(Isa::load(block.sums.get() + r * W));
    const float tangent_sum = Isa::reduce_add(Isa::load(block.tangent_sums.get() + r * W));
    const RowTotal total = rows_.store(b, n, i, r, out, state);
    const bool empty = total.divisor == 0.0f;
    const float mean = (empty ? 0.0f : tangent_sum / total.divisor) + of_sink(b, n, empty, total);
    const float factor = empty ? 0.0f : call_.dropout.scale / total.divisor;
    // Without tangents of logits none is taken out, even if the output is not finite.
    if (!empty && mean != 0.0f) {
      for (int64_t v = 0; v < call_.V; ++v) tangent[v] -= mean * out[v];
    }
    store_row<Isa>(call_.tangent_out, call_.tangent_out.at(b, i, n), tangent, call_.V, factor);
    const Result& log_sum_exp = call_.tangent_log_sum_exp;
    static_cast<float*>(log_sum_exp.data)[log_sum_exp.at(b, i, n)] = mean;
  }

  // The sink's part of the tangent of the log-sum-exp: all of it where a row sees no key.
  float of_sink(int64_t b, int64_t n, bool empty, const RowTotal& total) const {
    const Operand& x = call_.sinks_tangent;
    if (!x) return 0.0f;
    const float p = empty ? (sink_of(call_, b, n) > kHidden ? 1.0f : 0.0f)
                          : sink_probability(call_, b, n, total.maximum, total.log2_sum);
    if (p == 0.0f) return 0.0f;
    return p * float_at(x.data, x.dtype, x.batch_offset[static_cast<size_t>(b)] + n * x.stride[0]);
  }

  const AttentionTangentCall& call_;
  Parallel& parallel_;
  const int64_t value_panels_, value_columns_, row_blocks_;
  const int64_t product_lanes_;  // of the products that move logits
  const bool moves_logits_;      // whether logits have tangents
  KeyValueRows<Core> key_values_;
  TangentKeyValues<Isa> packed_;
  MaskTiles mask_tiles_;
  const ForwardRows<Core> rows_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
