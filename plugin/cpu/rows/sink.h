// The sink of a query head: a logit that is in the denominator of the softmax alone, as that of a
// key whose value is 0. Logits are in base 2.
#pragma once

#include <cmath>

#include "cpu/rows/logit_rules.h"

namespace jax_gluon::cpu {
namespace {

// The sink of query head n; kHidden: none.
inline float sink_of(const AttentionCall& call, int64_t b, int64_t n) {
  if (!call.sinks) return kHidden;
  const int64_t at = call.sinks.batch_offset[static_cast<size_t>(b)] + n * call.sinks.stride[0];
  return static_cast<const float*>(call.sinks.data)[at] * kLog2E;
}

// What a row's softmax ends with: what its sums of values are divided by, the part of all
// probabilities that its keys have, and the two parts of its log-sum-exp.
struct RowTotal {
  float divisor, share, maximum, log2_sum;
};

// Of a row whose probabilities, relative to 2^maximum, have this sum. Sums of several parts of the
// keys are merged before.
inline RowTotal total_of(float sum, float maximum, float sink) {
  if (sink == kHidden) return {sum, 1.0f, maximum, std::log2(sum)};
  const float divisor = sum + std::exp2(sink - maximum), share = sum / divisor;
  if (!(sink > maximum)) return {divisor, share, maximum, std::log2(divisor)};
  // The divisor may be infinite.
  return {divisor, share, sink, std::log2(1.0f + sum * std::exp2(maximum - sink))};
}

// The probability of the sink, from the parts of a row's log-sum-exp.
inline float sink_probability(const AttentionCall& call, int64_t b, int64_t n, float maximum,
                              float log2_sum) {
  return call.sinks ? std::exp2((sink_of(call, b, n) - maximum) - log2_sum) : 0.0f;
}

}  // namespace
}  // namespace jax_gluon::cpu
