// Products of two by two tiles: each tile that is loaded is multiplied twice.
#pragma once

#include <cstdint>

#include "cpu/simd/compiler.h"
#include "cpu/transposed/tile_cores.h"

namespace jax_gluon::cpu {
namespace {

// Two tiles of an operand, `next` apart, and those of the steps after it; in bytes.
struct QuadOperand {
  const void* first;
  int64_t next, step, stride = 64;
};
// Rows of tiles are `next_row` apart, columns `next_column`.
struct QuadSums {
  void* first;
  int64_t next_row, next_column, stride = 64;
};

// sums = left right over all steps; with kAdds, sums += it.
template <class Core, bool kAdds>
JAX_GLUON_INLINE void multiply_quad(const QuadOperand& left, const QuadOperand& right,
                                    int64_t steps, const QuadSums& sums) {
  using Tile = typename Core::Isa::Tile;
  char* const rows[2] = {static_cast<char*>(sums.first),
                         static_cast<char*>(sums.first) + sums.next_row};
  if constexpr (kAdds) {
    Tile::template load<0>(rows[0], sums.stride);
    Tile::template load<1>(rows[0] + sums.next_column, sums.stride);
    Tile::template load<2>(rows[1], sums.stride);
    Tile::template load<3>(rows[1] + sums.next_column, sums.stride);
  } else {
    Tile::template zero<0>();
    Tile::template zero<1>();
    Tile::template zero<2>();
    Tile::template zero<3>();
  }
  const char* a = static_cast<const char*>(left.first);
  const char* b = static_cast<const char*>(right.first);
  for (; steps > 0; --steps, a += left.step, b += right.step) {
    Tile::template load<4>(a, left.stride);
    Tile::template load<6>(b, right.stride);
    Core::template dot_keys<0, 4, 6>();
    Tile::template load<7>(b + right.next, right.stride);
    Core::template dot_keys<1, 4, 7>();
    Tile::template load<5>(a + left.next, left.stride);
    Core::template dot_keys<2, 5, 6>();
    Core::template dot_keys<3, 5, 7>();
  }
  Tile::template store<0>(rows[0], sums.stride);
  Tile::template store<1>(rows[0] + sums.next_column, sums.stride);
  Tile::template store<2>(rows[1], sums.stride);
  Tile::template store<3>(rows[1] + sums.next_column, sums.stride);
}

}  // namespace
}  // namespace jax_gluon::cpu
