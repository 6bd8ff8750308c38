// The powers of 4 that large tokens were divided by, as they are stored, and how they are found.
#pragma once

#include <cstdint>
#include <limits>

#include "attention_call.h"

namespace jax_gluon::cpu {
namespace {

// Of five tokens, from the lowest bits on.
inline uint16_t power_cell_of(uint32_t powers) {
  return static_cast<uint16_t>((powers & 0x3fffu) | (powers & 0x4000u) << 1 |
                               (~powers & 0x2000u) << 1);
}
inline uint32_t powers_of_cell(uint16_t cell) {
  return (cell & 0x3fffu) | (static_cast<uint32_t>(cell) >> 1 & 0x4000u);
}

// 4^power of a token of a block.
inline float token_factor(const uint16_t* cells, int64_t token) {
  const uint32_t powers = powers_of_cell(cells[token / kPowersInCell]);
  return static_cast<float>(1u << (powers >> 3 * (token % kPowersInCell) & 7u) * 2);
}

// The largest power of 4 that a token is at least, in ordinary ones; both norms are squared. What
// is not finite has none.
inline int token_power(float norm, float ordinary) {
  if (!(ordinary > 0.0f) || !(norm <= std::numeric_limits<float>::max())) return 0;
  int power = 0;
  float next = 16.0f * ordinary;
  while (power < kLargestPower && norm >= next) {
    next *= 16.0f;
    ++power;
  }
  return power;
}

}  // namespace
}  // namespace jax_gluon::cpu
