// What both backward kernels need of the operands: float32 rows, dequantized and safe to multiply.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rows/centered_rows.h"
#include "cpu/rows/sink.h"
#include "cpu/tiles/pack.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

// The operands of a backward call as float32 rows. Quantized keys come without their center, values
// without the one that the quantizer took away: what it adds to a row's logits is one number, kept
// beside the row's maximum, and what it adds to dP, the sink's too, and to delta cancels. (Not
// under dropout: values then come with it.)
template <class Isa, class Call>
class BackwardRows {
 public:
  explicit BackwardRows(const Call& call)
      : call_(call),
        keys_(call, call.key, call.H),
        values_(call, call.value, call.V, static_cast<bool>(call.dropout)) {}

  void find_centers(Parallel& parallel) { keys_.find_centers(parallel); }

  void key(int64_t b, int64_t j, int64_t k, float* out) const { keys_.load(b, j, k, out); }
  void value(int64_t b, int64_t j, int64_t k, float* out) const { values_.load(b, j, k, out); }
  void query(int64_t b, int64_t i, int64_t n, float* out) const {
    QuantizedRow<Isa>::load_uncentered(call_.query, b, i, n, call_.H, out);
  }
  void d_out(int64_t b, int64_t i, int64_t n, float* out) const {
    load_row<Isa>(row_of(call_.d_out, b, i, n), call_.d_out.dtype, call_.V, out);
  }

  // Whether rowsum(dO * O) is delta: nothing that O was made of was rounded, nor O itself.
  bool output_is_exact() const {
    const auto is_exact = [](const QuantizableOperand& x) {
      return !x.quantization && x.dtype == DType::kF32;
    };
    return call_.out.dtype == DType::kF32 && is_exact(call_.query) && is_exact(call_.key) &&
           is_exact(call_.value);
  }
  // rowsum(dO * O) of row (b, i, n), which `d_out` holds; `row` is scratch of V floats.
  float output_delta(int64_t b, int64_t i, int64_t n, const float* d_out, float* row) const {
    load_row<Isa>(row_of(call_.out, b, i, n), call_.out.dtype, call_.V, row);
    return dot<Isa>(d_out, row, call_.V);
  }

  // Whether what a center of keys adds to dQ, rowsum(dS) times it, may not be exactly zero: the
  // logits were capped, the log-sum-exp has a cotangent, or there is a sink.
  bool key_center_matters() const {
    return call_.soft_cap != 0.0f || call_.d_log_sum_exp || call_.sinks;
  }
  const float* key_center(int64_t b, int64_t k) const { return keys_.center_of(b, k); }

  struct Statistics {
    bool empty = true;
    float maximum = 0.0f, log2_sum = 0.0f;  // of the logits that the kernels recompute
    float delta = 0.0f;                     // dS = P * (dP - delta): the kernels add D
    float factor = 1.0f;                    // of P, so that it sums to 1
    float center = 0.0f;                    // added to every logit before bias and soft cap
    // P and P dP of the sink, a key whose value is 0.
    float sink = 0.0f, weighted_sink = 0.0f;
    bool has_mean = false;  // D is in delta

    // D, the mean of dP, and what makes probabilities of P, from sums of P dP and of P over the
    // keys: forward may have multiplied other codes of the key, so that its log-sum-exp is not that
    // of these scores. Where the sum is not finite P is left as it is, 0 for hidden keys.
    void take_sums(float weighted, float total) {
      if (has_mean) return;
      total += sink;
      if (total == 0.0f) return;
      delta += (weighted + weighted_sink) / total;
      if (total < std::numeric_limits<float>::infinity()) factor = 1.0f / total;
    }
  };

  // `query` and `d_out` hold row (b, i, n).
  Statistics statistics(int64_t b, int64_t i, int64_t n, const float* query,
                        const float* d_out) const {
    Statistics s;
    s.maximum = scalar_of(call_.row_maximum, b, i, n);
    s.log2_sum = scalar_of(call_.log2_sum, b, i, n);
    s.empty = s.log2_sum == kEmptyRowLog2Sum;
    if (s.empty) return s;
    if (call_.d_log_sum_exp) s.delta = -scalar_of(call_.d_log_sum_exp, b, i, n);
    s.has_mean = call_.is_partial;
    if (s.has_mean) s.delta -= value_center_product(b, n, d_out);
    s.sink = sink_probability(call_, b, n, s.maximum, s.log2_sum);
    if (s.sink != 0.0f) s.weighted_sink = -s.sink * value_center_product(b, n, d_out);
    if (const float* stored = key_center(b, n / (call_.N / call_.K))) {
      const float center = call_.scale * kLog2E * dot<Isa>(query, stored, call_.H);
      if (needs_whole_logits(call_)) {
        s.center = center;
      } else {
        s.maximum -= center;
      }
    }
    return s;
  }

 private:
  // What dP of a value 0 is less than that of the values' center.
  float value_center_product(int64_t b, int64_t n, const float* d_out) const {
    const float* center = values_.center_of(b, n / (call_.N / call_.K));
    return center ? dot<Isa>(d_out, center, call_.V) : 0.0f;
  }

  const Call& call_;
  CenteredRows<Isa> keys_, values_;
};

// A row of a tile of scores, whose column c is key key0 + c.
struct TileRow {
  int64_t query = 0, key0 = 0;
  Range columns, visible;  // what is computed; the keys that the row sees
  float *p = nullptr, *d_p = nullptr;
  float* cap_slope = nullptr;  // null without a soft cap
};

// P in place of scaled products, base 2; dP = dO V^T stands there. Adds lanes of sum(P dP) to
// `weighted` and of sum(P) to `total`; `cap_slope` takes d logit / d (uncapped logit).
template <class Isa, class Rules, class Statistics>
void probability_row(const Rules& rules, const Statistics& statistics, const TileRow& row,
                     float* weighted, float* total) {
  constexpr int64_t W = Isa::kLanes;
  const int64_t begin = row.columns.begin, end = row.columns.end;
  float* scores = row.p;
  const float* d_probability = row.d_p;
  if (statistics.center != 0.0f) {
    for (int64_t j = begin; j < end; j += W) {
      Isa::store(scores + j, Isa::add(Isa::load(scores + j), Isa::set1(statistics.center)));
    }
  }
  const Range keys{row.key0 + begin, row.key0 + end};
  if (rules.any({row.query, row.query + 1}, keys) || !contains(row.visible, keys)) {
    rules.apply(scores, row.query, row.key0, begin, end, row.visible, row.cap_slope);
  }
  const auto maximum = Isa::set1(statistics.maximum);
  const auto log2_sum = Isa::set1(statistics.log2_sum);
  auto p_sum = Isa::load(total), weighted_sum = Isa::load(weighted);
  for (int64_t j = begin; j < end; j += W) {
    // In this order: log2_sum would vanish in a large maximum.
    const auto below_maximum = Isa::sub(Isa::load(scores + j), maximum);
    const auto p = Isa::template exp2<5>(Isa::sub(below_maximum, log2_sum));
    // Hidden keys have P = 0 exactly; their dP may be NaN.
    const auto term = Isa::where_nonzero(p, Isa::mul(p, Isa::load(d_probability + j)));
    p_sum = Isa::add(p_sum, p);
    weighted_sum = Isa::add(weighted_sum, term);
    Isa::store(scores + j, p);
  }
  Isa::store(total, p_sum);
  Isa::store(weighted, weighted_sum);
}

// Of the keys of a row that dropout keeps, dP grows by its scale; of those that it drops, it is 0.
template <class Isa>
void drop_gradient(const uint8_t* keep, float scale, const TileRow& row) {
  float* d_p = row.d_p + row.columns.begin;
  for (int64_t j = 0; j < row.columns.end - row.columns.begin; j += Isa::kLanes) {
    const auto grown = Isa::mul(Isa::load(d_p + j), Isa::set1(scale));
    Isa::store(d_p + j, Isa::where_visible(keep + j, grown, Isa::zero()));
  }
}

// Marks what is dropped by its sign: dS takes all of P, dV what is kept.
template <class Isa>
void mark_dropped(const uint8_t* keep, const TileRow& row) {
  float* p = row.p + row.columns.begin;
  for (int64_t j = 0; j < row.columns.end - row.columns.begin; j += Isa::kLanes) {
    const auto x = Isa::load(p + j);
    Isa::store(p + j, Isa::where_visible(keep + j, x, Isa::sub(Isa::zero(), x)));
  }
}

// dS = P * (dP - delta) in place of dP, and its sum; P becomes what dV takes. With kMarked, P is
// marked: of what is kept dV takes P times `scale`.
template <class Isa, bool kMarked = false, class Statistics>
float gradient_row(const Statistics& statistics, const TileRow& row,
                   [[maybe_unused]] float scale = 1.0f) {
  const int64_t begin = row.columns.begin, end = row.columns.end;
  const float* cap_slope = row.cap_slope;
  float *p = row.p, *d_probability = row.d_p;
  const auto factor = Isa::set1(statistics.factor), delta = Isa::set1(statistics.delta);
  const bool scales = statistics.factor != 1.0f;
  auto sum = Isa::zero();
  for (int64_t j = begin; j < end; j += Isa::kLanes) {
    auto x = Isa::load(p + j);
    if (scales) {
      x = Isa::mul(x, factor);
      if constexpr (!kMarked) Isa::store(p + j, x);
    }
    if constexpr (kMarked) {
      const auto kept = Isa::mul(x, Isa::set1(scale));
      Isa::store(p + j, Isa::where_less(x, Isa::zero(), Isa::zero(), kept));
      x = Isa::abs(x);
    }
    auto ds = Isa::mul(x, Isa::sub(Isa::load(d_probability + j), delta));
    if (cap_slope) ds = Isa::mul(ds, Isa::load(cap_slope + j));
    // Where P = 0 neither dP nor the slope need be there.
    ds = Isa::where_nonzero(x, ds);
    sum = Isa::add(sum, ds);
    Isa::store(d_probability + j, ds);
  }
  return Isa::reduce_add(sum);
}

}  // namespace
}  // namespace jax_gluon::cpu
