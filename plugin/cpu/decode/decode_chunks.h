// Attention of a few queries over many keys: the keys are split into chunks, so that all threads
// work on few heads, and the chunks' partial results are merged (Flash-Decoding).
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/memory/buffer.h"
#include "cpu/rows/logit_rules.h"
#include "cpu/rows/quantized_rows.h"
#include "cpu/rows/sink.h"
#include "device.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class DecodeChunks {
 public:
  static constexpr int64_t kMaxQueries = 4;
  static bool takes(const AttentionForwardCall& call) {
    return call.T <= kMaxQueries && !call.dropout;
  }

  // Rows of a kv head.
  static int64_t rows_of(const AttentionForwardCall& call) {
    return call.T * (call.N / std::max<int64_t>(call.K, 1));
  }

  // The length of a chunk: at least min_keys, and so long that partial results of many rows take no
  // more memory than those of a few.
  static int64_t keys_of(const AttentionForwardCall& call, int64_t min_keys) {
    constexpr int64_t kMaxPartials = 4096, kMinChunks = 16;
    const int64_t chunks = std::max(kMaxPartials / std::max<int64_t>(rows_of(call), 1), kMinChunks);
    return std::max(min_keys, round_up(ceil_div(call.S, chunks), min_keys));
  }

  // `keys` is the length of a chunk: by shape alone, so that results are the same for any number of
  // threads.
  DecodeChunks(const AttentionForwardCall& call, Parallel& parallel, int64_t keys)
      : call_(call),
        parallel_(parallel),
        chunk_keys_(keys),
        group_(call.N / std::max<int64_t>(call.K, 1)),
        head_rows_(call.T * group_),
        chunks_(std::max<int64_t>(1, ceil_div(call.S, keys))) {}

  // Rows of a kv head: row r is query r / group of head k * group + r % group.
  int64_t rows() const { return head_rows_; }
  int64_t query_of(int64_t r) const { return r / group_; }
  int64_t head_of(int64_t k, int64_t r) const { return k * group_ + r % group_; }

  // What a chunk found for row r of kv head k: V sums of values by probabilities relative to
  // 2^maximum, and the sum of those.
  struct Partial {
    float *values, *maximum, *sum;
  };
  Partial partial(int64_t b, int64_t k, int64_t chunk, int64_t r) const {
    const int64_t index = ((b * call_.K + k) * chunks_ + chunk) * head_rows_ + r;
    float* values = partials_.get() + index * (call_.V + 2);
    return {values, values + call_.V, values + call_.V + 1};
  }

  // Calls attend(b, chunk, visibility, keys) for every chunk with keys that some row may see. It
  // fills the partials of all kv heads.
  template <class Attend>
  void run(Attend attend) {
    const int64_t heads = call_.B * call_.K;
    if (heads * call_.T == 0) return;
    partials_.allocate(heads * chunks_ * head_rows_ * (call_.V + 2));
    parallel_.run(call_.B * chunks_, [&](int64_t task) {
      const int64_t b = task / chunks_, chunk = task % chunks_;
      const Visibility visibility(call_, b);
      const Range all{chunk * chunk_keys_, std::min(call_.S, (chunk + 1) * chunk_keys_)};
      const Range keys = intersect(visibility.keys(), all);
      if (!keys.empty()) return attend(b, chunk, visibility, keys);
      for (int64_t i = 0; i < call_.K * head_rows_; ++i) {
        const Partial none = partial(b, i / head_rows_, chunk, i % head_rows_);
        *none.maximum = kHidden;
        *none.sum = 0.0f;
      }
    });
    parallel_.run(heads, [&](int64_t head) { merge(head / call_.K, head % call_.K); });
  }

 private:
  void merge(int64_t b, int64_t k) const {
    const float* center = stored_center(call_.value, b, k);
    Buffer<float> out(call_.V);
    for (int64_t r = 0; r < head_rows_; ++r) {
      float maximum = kHidden, sum = 0.0f;
      for (int64_t c = 0; c < chunks_; ++c) {
        maximum = std::max(maximum, *partial(b, k, c, r).maximum);
      }
      const float reference = maximum == kHidden ? 0.0f : maximum;
      std::fill(out.get(), out.get() + call_.V, 0.0f);
      for (int64_t c = 0; c < chunks_; ++c) {
        const Partial from = partial(b, k, c, r);
        if (*from.sum == 0.0f) continue;
        const float factor = *from.maximum == kHidden ? 1.0f : std::exp2(*from.maximum - reference);
        sum += *from.sum * factor;
        for (int64_t v = 0; v < call_.V; ++v) out[v] += from.values[v] * factor;
      }
      const bool empty = sum == 0.0f;
      const RowTotal total = total_of(sum, reference, sink_of(call_, b, head_of(k, r)));
      float factor = empty ? 0.0f : 1.0f / total.divisor;
      if (center && !empty) {
        for (int64_t v = 0; v < call_.V; ++v) out[v] = out[v] * factor + center[v] * total.share;
        factor = 1.0f;
      }
      const int64_t i = query_of(r), n = head_of(k, r), index = call_.row_maximum.at(b, i, n);
      store_row<Isa>(call_.out, call_.out.at(b, i, n), out.get(), call_.V, factor);
      static_cast<float*>(call_.row_maximum.data)[index] = empty ? 0.0f : total.maximum;
      static_cast<float*>(call_.log2_sum.data)[index] = empty ? kEmptyRowLog2Sum : total.log2_sum;
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t chunk_keys_, group_, head_rows_, chunks_;
  Buffer<float> partials_;
};

}  // namespace
}  // namespace jax_gluon::cpu
