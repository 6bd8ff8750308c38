// Attention of a few queries over many keys, as in generating token by token: keys and values are
// read once, as they are stored, and unpacked in registers; the keys are split into chunks, so that
// all threads work on few heads, and the chunks' partial results are merged (Flash-Decoding).
#pragma once

#include <cmath>

#include "centred_rows.h"
#include "microkernel.h"

namespace jax_gluon::cpu {
namespace {

// Elements of a stored row as vectors. A step reads kStep elements; where a byte holds two, the
// first vector takes the even and the second the odd ones, and whatever meets them is stored in
// that order.
template <class Isa, DType dtype>
struct StoredRow {
  using F = typename Isa::F;
  static constexpr bool kNibbles = dtype == DType::kU4x2;
  static constexpr int kVectors = kNibbles ? 2 : 1;
  static constexpr int64_t kStep = kVectors * Isa::kLanes;

  // `row` points at element i.
  static void load(const char* row, F* out) {
    if constexpr (dtype == DType::kF32) {
      out[0] = Isa::load(reinterpret_cast<const float*>(row));
    } else if constexpr (dtype == DType::kBF16) {
      out[0] = Isa::load_bf16(reinterpret_cast<const uint16_t*>(row));
    } else if constexpr (dtype == DType::kF16) {
      out[0] = Isa::load_f16(reinterpret_cast<const uint16_t*>(row));
    } else if constexpr (dtype == DType::kS8) {
      out[0] = Isa::load_s8(reinterpret_cast<const int8_t*>(row));
    } else {
      Isa::load_nibbles(reinterpret_cast<const uint8_t*>(row), &out[0], &out[1]);
    }
  }
  static constexpr int64_t bytes(int64_t elements) {
    return kNibbles ? elements / 2 : elements * static_cast<int64_t>(size_of(dtype));
  }
  // Where element h stands in the order of the vectors.
  static constexpr int64_t position(int64_t h) {
    if constexpr (!kNibbles) return h;
    return h / kStep * kStep + h % 2 * Isa::kLanes + h % kStep / 2;
  }
};

template <class Isa>
class AttentionDecode {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;
  // Keys whose scores are alive at once, and keys of a task: by shape alone, so that results are
  // the same for any number of threads.
  static constexpr int64_t kSubtile = 64, kChunk = 512;
  static constexpr int64_t kMostQueries = 4, kMostRows = 16;
  using Rules = LogitRules<Isa, kSubtile>;

 public:
  AttentionDecode(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        group_(call.N / std::max<int64_t>(call.K, 1)),
        rows_(call.T * group_),
        head_width_(round_up(call.H, 2 * W)),
        value_width_(round_up(call.V, 2 * W)),
        chunks_(std::max<int64_t>(1, ceil_div(call.S, kChunk))),
        scratch_(parallel.threads()) {}

  static bool takes(const AttentionForwardCall& call) {
    return call.T <= kMostQueries && call.T * (call.N / std::max<int64_t>(call.K, 1)) <= kMostRows;
  }

  void run() {
    const int64_t heads = call_.B * call_.K;
    if (heads * call_.T == 0) return;
    partial_.allocate(heads * chunks_ * rows_ * partial_width());
    parallel_.run(heads * chunks_,
                  [this](int64_t task) { attend(task / chunks_, task % chunks_); });
    parallel_.run(heads, [this](int64_t head) { merge(head); });
  }

 private:
  // How the numbers of a row are scaled.
  enum class Scaling : uint8_t {
    kNone,   // floats
    kRow,    // one scale and offset a row
    kBlock,  // keys: for each element, shared by several rows: folded into the queries
    kGroup,  // values: one for each run of elements: folded into the probabilities
    kLoose,  // anything else: rows are dequantized to floats first
  };

  struct Scratch {
    Buffer<float> query, folded;    // [rows][head_width], in the order of the stored vectors
    Buffer<float> scores, weights;  // [rows][kSubtile], [groups][rows][kSubtile]
    Buffer<float> out;              // [rows][value_width], in the order of the stored vectors
    Buffer<float> offsets;          // [rows][groups]: sums of probability * offset
    Buffer<float> maximum, sum, query_sum, constant, centre;  // [rows]
    Buffer<float> row, dequantized;
    Buffer<char> padded;
    int64_t folded_block = -1;
  };

  int64_t partial_width() const { return value_width_ + 2; }
  float* partial(int64_t head, int64_t chunk, int64_t row) const {
    return partial_.get() + ((head * chunks_ + chunk) * rows_ + row) * partial_width();
  }

  static Scaling key_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    return q.token_block == 0 || q.token_block >= 8 ? Scaling::kBlock : Scaling::kLoose;
  }
  static Scaling value_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    return q.head_block % (2 * W) == 0 ? Scaling::kGroup : Scaling::kLoose;
  }
  int64_t value_groups() const {
    const Quantization& q = call_.value.quantization;
    return value_scaling(q) == Scaling::kGroup ? ceil_div(call_.V, q.head_block) : 1;
  }

  void prepare(Scratch& s) const {
    const int64_t groups = value_groups();
    s.query.allocate(rows_ * head_width_);
    s.folded.allocate(rows_ * head_width_);
    s.scores.allocate(rows_ * kSubtile);
    s.weights.allocate(groups * rows_ * kSubtile);
    s.out.allocate(rows_ * value_width_);
    s.offsets.allocate(rows_ * groups);
    for (Buffer<float>* each : {&s.maximum, &s.sum, &s.query_sum, &s.constant, &s.centre}) {
      each->allocate(rows_);
    }
    const int64_t widest = std::max(head_width_, value_width_);
    s.row.allocate(widest);
    s.dequantized.allocate(kSubtile * widest);
    s.padded.allocate(kSubtile * widest * 4);
  }

  // Calls f with the storage of an operand as a StoredRow type; loose rows are floats.
  template <class Function>
  static void with_storage(const Operand& x, bool loose, Function f) {
    if (loose) return f(StoredRow<Isa, DType::kF32>());
    switch (x.dtype) {
      case DType::kF32:
        return f(StoredRow<Isa, DType::kF32>());
      case DType::kBF16:
        return f(StoredRow<Isa, DType::kBF16>());
      case DType::kF16:
        return f(StoredRow<Isa, DType::kF16>());
      case DType::kS8:
        return f(StoredRow<Isa, DType::kS8>());
      case DType::kU4x2:
        return f(StoredRow<Isa, DType::kU4x2>());
    }
  }

  // Row r is query t = r / group of head n = k * group + r % group.
  int64_t query_of(int64_t r) const { return r / group_; }
  int64_t head_of(int64_t k, int64_t r) const { return k * group_ + r % group_; }

  void attend(int64_t head, int64_t chunk) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Visibility visibility(call_, b);
    const Range chunk_keys{chunk * kChunk, std::min(call_.S, (chunk + 1) * kChunk)};
    const Range keys = intersect(visibility.of_rows({0, call_.T}), chunk_keys);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    std::fill(s.out.get(), s.out.get() + rows_ * value_width_, 0.0f);
    std::fill(s.offsets.get(), s.offsets.get() + rows_ * value_groups(), 0.0f);
    std::fill(s.maximum.get(), s.maximum.get() + rows_, kHidden);
    std::fill(s.sum.get(), s.sum.get() + rows_, 0.0f);
    if (!keys.empty()) {
      const bool loose_keys = key_scaling(call_.key.quantization) == Scaling::kLoose;
      const bool loose_values = value_scaling(call_.value.quantization) == Scaling::kLoose;
      with_storage(call_.key, loose_keys, [&](auto key) {
        load_queries<decltype(key)>(b, k, s);
        for (int64_t j = keys.begin; j < keys.end; j += kSubtile) {
          const Range subtile{j, std::min(j + kSubtile, keys.end)};
          find_scores<decltype(key)>(b, k, subtile, s);
          if (!find_weights(visibility, b, k, subtile, s)) continue;
          with_storage(call_.value, loose_values, [&](auto value) {
            add_values<decltype(value)>(visibility, b, k, subtile, s);
          });
        }
      });
    }
    with_storage(call_.value, value_scaling(call_.value.quantization) == Scaling::kLoose,
                 [&](auto value) { store_partial<decltype(value)>(head, chunk, s); });
  }

  // Queries, scaled, in the order in which the key's elements come; their padding is zero.
  template <class Key>
  void load_queries(int64_t b, int64_t k, Scratch& s) const {
    std::fill(s.query.get(), s.query.get() + rows_ * head_width_, 0.0f);
    s.folded_block = -1;
    const float* mean = mean_of(call_.key, b, k);
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = s.row.get();
      QuantizedRow<Isa>::load_uncentred(call_.query, b, query_of(r), head_of(k, r), call_.H, row);
      scale_row<Isa>(row, call_.H, call_.scale * kLog2E);
      float* query = s.query.get() + r * head_width_;
      float total = 0.0f;
      for (int64_t h = 0; h < call_.H; ++h) {
        query[Key::position(h)] = row[h];
        total += row[h];
      }
      s.query_sum[r] = total;
      s.constant[r] = 0.0f;
      s.centre[r] = mean ? dot<Isa>(row, mean, call_.H) : 0.0f;
    }
  }

  // Rows of a subtile as pointers, dequantized or padded where they can't be read in whole steps.
  template <class Stored>
  const char* rows_as_stored(const QuantizableOperand& x, int64_t b, int64_t k, Range keys,
                             int64_t width, bool loose, int64_t* stride, Scratch& s) const {
    const int64_t padded = round_up(width, Stored::kStep);
    if (loose) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        float* row = s.dequantized.get() + (j - keys.begin) * padded;
        QuantizedRow<Isa>::load(x, b, j, k, width, row);
        std::fill(row + width, row + padded, 0.0f);
      }
      *stride = padded * 4;
      return reinterpret_cast<const char*>(s.dequantized.get());
    }
    if (padded == width) {
      *stride = x.stride[0] * static_cast<int64_t>(size_of(x.dtype));
      return static_cast<const char*>(row_of(x, b, keys.begin, k));
    }
    const int64_t bytes = Stored::bytes(padded);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      char* row = s.padded.get() + (j - keys.begin) * bytes;
      std::memset(row + Stored::bytes(width), 0, static_cast<size_t>(bytes - Stored::bytes(width)));
      std::memcpy(row, row_of(x, b, j, k), static_cast<size_t>(Stored::bytes(width)));
    }
    *stride = bytes;
    return s.padded.get();
  }

  template <class Key>
  void find_scores(int64_t b, int64_t k, Range keys, Scratch& s) const {
    const Scaling scaling = key_scaling(call_.key.quantization);
    int64_t stride = 0;
    const char* row =
        rows_as_stored<Key>(call_.key, b, k, keys, call_.H, scaling == Scaling::kLoose, &stride, s);
    for (int64_t j = keys.begin; j < keys.end; ++j, row += stride) {
      const float* query = s.query.get();
      ScaleAndOffset scale{1.0f, 0.0f};
      if (scaling == Scaling::kRow) {
        scale = scale_at(call_.key, b, j, k);
      } else if (scaling == Scaling::kBlock) {
        fold_scales<Key>(b, j, k, s);
        query = s.folded.get();
      }
      const int64_t at = j - keys.begin;
      int64_t r = 0;
      for (; r + 4 <= rows_; r += 4) dot_rows<Key, 4>(row, query, r, at, scale, s);
      for (; r < rows_; ++r) dot_rows<Key, 1>(row, query, r, at, scale, s);
    }
  }

  template <class Key, int kRows>
  void dot_rows(const char* row, const float* query, int64_t r, int64_t at, ScaleAndOffset scale,
                Scratch& s) const {
    constexpr int64_t kStep = Key::kStep;
    constexpr int kVectors = Key::kVectors, kChains = kRows == 1 && kVectors == 1 ? 2 : 1;
    F acc[kRows][kVectors * kChains];
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors * kChains; ++v) acc[i][v] = Isa::zero();
    }
    const float* q = query + r * head_width_;
    const int64_t whole = round_up(call_.H, kStep);
    const auto step = [&](int64_t h, int chain) {
      F x[kVectors];
      Key::load(row + Key::bytes(h), x);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kRows; ++i) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          F& a = acc[i][chain * kVectors + v];
          a = Isa::fma(x[v], Isa::load(q + i * head_width_ + h + v * W), a);
        }
      }
    };
    int64_t h = 0;
    for (; h + kChains * kStep <= whole; h += kChains * kStep) {
      JAX_GLUON_UNROLL
      for (int chain = 0; chain < kChains; ++chain) step(h + chain * kStep, chain);
    }
    for (; h < whole; h += kStep) step(h, 0);
    for (int i = 0; i < kRows; ++i) {
      F total = acc[i][0];
      for (int v = 1; v < kVectors * kChains; ++v) total = Isa::add(total, acc[i][v]);
      const float offset = scale.offset == 0.0f ? 0.0f : scale.offset * s.query_sum[r + i];
      s.scores[(r + i) * kSubtile + at] =
          Isa::reduce_add(total) * scale.scale + offset + s.constant[r + i];
    }
  }

  // Queries times the scales that key j shares with others of its block, and their product with the
  // offsets.
  template <class Key>
  void fold_scales(int64_t b, int64_t j, int64_t k, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    const int64_t block = q.token_block == 0 ? 0 : j / q.token_block;
    if (block == s.folded_block) return;
    s.folded_block = block;
    std::fill(s.folded.get(), s.folded.get() + rows_ * head_width_, 0.0f);
    std::fill(s.constant.get(), s.constant.get() + rows_, 0.0f);
    for (int64_t h = 0; h < call_.H; ++h) {
      const ScaleAndOffset scale = scale_at(call_.key, b, j, k, h / q.head_block);
      const int64_t at = Key::position(h);
      for (int64_t r = 0; r < rows_; ++r) {
        const float x = s.query[r * head_width_ + at];
        s.folded[r * head_width_ + at] = x * scale.scale;
        s.constant[r] += x * scale.offset;
      }
    }
  }

  // Scores to probabilities relative to each row's running maximum, then to weights of the stored
  // values. False where no row sees any of the keys.
  bool find_weights(const Visibility& visibility, int64_t b, int64_t k, Range keys,
                    Scratch& s) const {
    const int64_t count = keys.end - keys.begin, padded = round_up(count, W);
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = s.scores.get() + r * kSubtile;
      std::fill(scores + count, scores + padded, 0.0f);
      if (call_.soft_cap != 0.0f && s.centre[r] != 0.0f) {
        for (int64_t j = 0; j < padded; ++j) scores[j] += s.centre[r];
      }
      const Rules rules(call_, b, head_of(k, r));
      Range visible = visibility.of_row(query_of(r));
      visible.end = std::min(visible.end, keys.end);
      rules.apply(scores, query_of(r), keys.begin, 0, padded, visible);
      any |= find_probabilities(scores, padded, r, s);
    }
    if (!any) return false;
    weigh(b, k, keys, s);
    return true;
  }

  bool find_probabilities(float* scores, int64_t padded, int64_t r, Scratch& s) const {
    F largest = Isa::set1(kHidden), nan = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F x = Isa::load(scores + j);
      largest = Isa::max(x, largest);
      nan =
          Isa::add(nan, Isa::where_less(x, Isa::set1(0.0f), Isa::zero(), Isa::mul(x, Isa::zero())));
    }
    const float before = s.maximum[r], now = std::max(before, Isa::reduce_max(largest));
    const bool poisoned = Isa::reduce_add(nan) != 0.0f;
    if (now == kHidden && !poisoned) {
      std::fill(scores, scores + padded, 0.0f);
      return false;
    }
    const float reference = now == kHidden ? 0.0f : now;
    if (before != now && before != kHidden) {
      const float rescale = std::exp2(before - now);
      s.sum[r] *= rescale;
      scale_row<Isa>(s.out.get() + r * value_width_, value_width_, rescale);
      const int64_t groups = value_groups();
      for (int64_t g = 0; g < groups; ++g) s.offsets[r * groups + g] *= rescale;
    }
    const F minus = Isa::set1(-reference);
    F total = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F p = Isa::template exp2<5>(Isa::add(Isa::load(scores + j), minus));
      Isa::store(scores + j, p);
      total = Isa::add(total, p);
    }
    s.maximum[r] = now;
    s.sum[r] += Isa::reduce_add(total);
    return true;
  }

  // Probabilities times the scales of their values; what the offsets add is summed apart. A hidden
  // key weighs exactly nothing, whatever its scale.
  void weigh(int64_t b, int64_t k, Range keys, Scratch& s) const {
    const Scaling scaling = value_scaling(call_.value.quantization);
    const int64_t groups = value_groups(), count = keys.end - keys.begin;
    const bool scaled = scaling == Scaling::kRow || scaling == Scaling::kGroup;
    if (!scaled) {
      std::memcpy(s.weights.get(), s.scores.get(),
                  static_cast<size_t>(rows_ * kSubtile) * sizeof(float));
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t g = 0; g < groups; ++g) {
        const ScaleAndOffset scale = scale_at(call_.value, b, keys.begin + j, k, g);
        for (int64_t r = 0; r < rows_; ++r) {
          const float p = s.scores[r * kSubtile + j];
          s.weights[(g * rows_ + r) * kSubtile + j] = p == 0.0f ? 0.0f : p * scale.scale;
          if (p != 0.0f) s.offsets[r * groups + g] += p * scale.offset;
        }
      }
    }
  }

  template <class Value>
  void add_values(const Visibility& visibility, int64_t b, int64_t k, Range keys,
                  Scratch& s) const {
    const Quantization& q = call_.value.quantization;
    const Scaling scaling = value_scaling(q);
    int64_t stride = 0;
    const char* rows = rows_as_stored<Value>(call_.value, b, k, keys, call_.V,
                                             scaling == Scaling::kLoose, &stride, s);
    // Floats of a hidden key may be NaN, which a weight of 0 does not take away.
    const bool floats = scaling == Scaling::kNone || scaling == Scaling::kLoose;
    const bool guard = floats && (call_.mask || call_.bias || (call_.T > 1 && !same(visibility)));
    const int64_t whole = round_up(call_.V, Value::kStep), count = keys.end - keys.begin;
    for (int64_t h = 0; h < whole;) {
      const int64_t group = scaling == Scaling::kGroup ? h / q.head_block : 0;
      const int64_t left =
          scaling == Scaling::kGroup ? std::min(whole, (group + 1) * q.head_block) - h : whole - h;
      const int64_t steps = left >= 4 / Value::kVectors * Value::kStep ? 4 / Value::kVectors : 1;
      for (int64_t r = 0; r < rows_; ++r) {
        const float* weights = s.weights.get() + (group * rows_ + r) * kSubtile;
        float* out = s.out.get() + r * value_width_ + h;
        const char* at = rows + Value::bytes(h);
        if (guard) {
          for (int64_t i = 0; i < steps; ++i) {
            add_columns<Value, 1, true>(at + Value::bytes(i * Value::kStep), stride, count, weights,
                                        out + i * Value::kStep);
          }
        } else if (steps > 1) {
          add_columns<Value, 4 / Value::kVectors, false>(at, stride, count, weights, out);
        } else {
          add_columns<Value, 1, false>(at, stride, count, weights, out);
        }
      }
      h += steps * Value::kStep;
    }
  }

  // Whether all queries see the same keys.
  bool same(const Visibility& visibility) const {
    const Range first = visibility.of_row(0), last = visibility.of_row(call_.T - 1);
    return first.begin == last.begin && first.end == last.end;
  }

  template <class Value, int kSteps, bool kGuard>
  static void add_columns(const char* row, int64_t stride, int64_t count, const float* weights,
                          float* out) {
    constexpr int kVectors = Value::kVectors;
    F acc[kSteps * kVectors];
    JAX_GLUON_UNROLL
    for (int v = 0; v < kSteps * kVectors; ++v) acc[v] = Isa::load(out + v * W);
    for (int64_t j = 0; j < count; ++j, row += stride) {
      const F weight = Isa::set1(weights[j]);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        F x[kVectors];
        Value::load(row + Value::bytes(i * Value::kStep), x);
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          F& a = acc[i * kVectors + v];
          if constexpr (kGuard) {
            a = Isa::add(a, Isa::where_nonzero(weight, Isa::mul(weight, x[v])));
          } else {
            a = Isa::fma(x[v], weight, a);
          }
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int v = 0; v < kSteps * kVectors; ++v) Isa::store(out + v * W, acc[v]);
  }

  // Of each row: its sum of values, in the order of its elements, maximum and sum of probabilities.
  template <class Value>
  void store_partial(int64_t head, int64_t chunk, Scratch& s) const {
    const int64_t groups = value_groups();
    const int64_t size = groups == 1 ? call_.V : call_.value.quantization.head_block;
    for (int64_t r = 0; r < rows_; ++r) {
      float* to = partial(head, chunk, r);
      const float* out = s.out.get() + r * value_width_;
      for (int64_t c = 0; c < call_.V; ++c) {
        to[c] = out[Value::position(c)] + s.offsets[r * groups + c / size];
      }
      to[value_width_] = s.maximum[r];
      to[value_width_ + 1] = s.sum[r];
      if (s.sum[r] != 0.0f && call_.soft_cap == 0.0f && s.maximum[r] != kHidden) {
        to[value_width_] += s.centre[r];
      }
    }
  }

  void merge(int64_t head) const {
    const int64_t b = head / call_.K, k = head % call_.K;
    const float* mean = mean_of(call_.value, b, k);
    Buffer<float> out(value_width_);
    for (int64_t r = 0; r < rows_; ++r) {
      float maximum = kHidden, sum = 0.0f;
      for (int64_t c = 0; c < chunks_; ++c) {
        maximum = std::max(maximum, partial(head, c, r)[value_width_]);
      }
      const float reference = maximum == kHidden ? 0.0f : maximum;
      std::fill(out.get(), out.get() + call_.V, 0.0f);
      for (int64_t c = 0; c < chunks_; ++c) {
        const float* from = partial(head, c, r);
        const float own = from[value_width_ + 1];
        if (own == 0.0f) continue;
        const float top = from[value_width_];
        const float factor = top == kHidden ? 1.0f : std::exp2(top - reference);
        sum += own * factor;
        for (int64_t v = 0; v < call_.V; ++v) out[v] += from[v] * factor;
      }
      const bool empty = sum == 0.0f;
      float factor = empty ? 0.0f : 1.0f / sum;
      if (mean && !empty) {
        for (int64_t v = 0; v < call_.V; ++v) out[v] = out[v] * factor + mean[v];
        factor = 1.0f;
      }
      const int64_t index = (b * call_.T + query_of(r)) * call_.N + head_of(k, r);
      store_row<Isa>(call_.out, index * call_.V, out.get(), call_.V, factor);
      static_cast<float*>(call_.log_sum_exp.data)[index] =
          empty ? kEmptyRowLogSumExp : reference + std::log2(sum);
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t group_, rows_, head_width_, value_width_, chunks_;
  Buffer<float> partial_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
