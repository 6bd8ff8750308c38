// The sink of a query head: a logit that is in the denominator of the softmax alone, as that of a
// key whose value is 0. Logits are in base 2.
#pragma once

#include "logits.h"

// -INFINITY: none.
inline float sink_of(thread const Operands& operands, int b, int n) {
  if (operands.parameters->has_sinks == 0) return -INFINITY;
  return operands.sink(b, n) * kLog2E;
}

// What a row's softmax ends with: what its sums of values are divided by, the part of all
// probabilities that its keys have, and the two parts of its log-sum-exp.
struct RowTotal {
  float divisor;
  float share;
  float maximum;
  float log2_sum;
};

// Of a row whose probabilities, relative to 2^maximum, have this sum. Sums of several parts of the
// keys are merged before.
inline RowTotal total_of(float sum, float maximum, float sink) {
  if (sink == -INFINITY) return {sum, 1.0f, maximum, log2(sum)};
  const float divisor = sum + exp2(sink - maximum), share = sum / divisor;
  if (!(sink > maximum)) return {divisor, share, maximum, log2(divisor)};
  // The divisor may be infinite.
  return {divisor, share, sink, log2(1.0f + sum * exp2(maximum - sink))};
}
