// Integer arithmetic of extents, and the numbers that stand for something else in results.
#pragma once

#include <cstdint>

namespace jax_gluon {
// Unnamed: files of different instruction sets include this, and their code must not be shared.
namespace {

// Of a >= 0, b > 0, without overflow.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Blocks along an axis; of size 0: one for all of it.
constexpr int64_t blocks_of(int64_t extent, int64_t size) {
  return size == 0 ? 1 : ceil_div(extent, size);
}

// A row's log-sum-exp is kept in base 2, in two parts: a maximum of its logits, and log2 of the sum
// of exp2(logit - maximum). One float32 could not hold the second beside a maximum of -1e9. A row
// that sees no key stores 0 and this finite value (infinity would trip jax_debug_infs); the Python
// side turns it into the row's sink, or into -inf.
constexpr float kEmptyRowLog2Sum = -3.0e38f;

// A bias below this hides its key like -inf: its logit may not be finite in base 2.
constexpr float kMinBias = -2.35e38f;

}  // namespace
}  // namespace jax_gluon
