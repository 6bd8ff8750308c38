// The products of tile_quad.h without tile registers: elements of the left operand are broadcast,
// lanes are columns of the right one.
#pragma once

#include "cpu/transposed/tile_quad.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class VectorQuadSteps {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  using I = typename Isa::I;
  // Rows of sums that are in registers at once, two vectors each: parts of a tile.
  static constexpr int kRows = 8, kTileParts = kTileQueries / kRows;
  static_assert(Core::kArithmetic == Arithmetic::kBf16);

 public:
  static constexpr int64_t count(const TileQuad&) { return 2 * kTileParts; }
  static void run(const TileQuad& quad, int64_t part) {
    const bool adds = quad.kind == TileQuad::Kind::kAddedProducts;
    if (part * kRows >= quad.extent.rows) {
      if (!adds) store_zeros(quad, part);
    } else if (quad.extent.columns > W) {
      adds ? multiply<2, true>(quad, part) : multiply<2, false>(quad, part);
    } else {
      adds ? multiply<1, true>(quad, part) : multiply<1, false>(quad, part);
    }
  }

 private:
  static constexpr int64_t W = kTileQueries;

  // Of part `part`, which is of one tile.
  static float* sums_of(const TileQuad& quad, int64_t part, int64_t r, int64_t column) {
    const int64_t tile = part / kTileParts, row = part % kTileParts * kRows + r;
    return reinterpret_cast<float*>(static_cast<char*>(quad.sums.first) +
                                    tile * quad.sums.next_row + column * quad.sums.next_column +
                                    row * quad.sums.stride);
  }
  static void store_zeros(const TileQuad& quad, int64_t part) {
    for (int r = 0; r < kRows; ++r) {
      Isa::store(sums_of(quad, part, r, 0), Isa::zero());
      Isa::store(sums_of(quad, part, r, 1), Isa::zero());
    }
  }

  template <int kColumns, bool kAdds>
  static void multiply(const TileQuad& quad, int64_t part) {
    F sum[kRows][kColumns];
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        sum[r][c] = kAdds ? Isa::load(sums_of(quad, part, r, c)) : Isa::zero();
      }
    }
    const int64_t stride = quad.left.stride;
    const char* left = static_cast<const char*>(quad.left.first) +
                       part / kTileParts * quad.left.next + part % kTileParts * kRows * stride;
    const char* right = static_cast<const char*>(quad.right.first);
    for (int64_t step = 0; step < quad.steps;
         ++step, left += quad.left.step, right += quad.right.step) {
      // Two terms each.
      const int64_t lanes = step + 1 < quad.steps ? W : ceil_div(quad.extent.last, 2);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const char* line = right + lane * quad.right.stride;
        I x[kColumns];
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) x[c] = Isa::load_i32(line + c * quad.right.next);
        JAX_GLUON_UNROLL
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          std::memcpy(&pair, left + r * stride + 4 * lane, sizeof pair);
          const I y = Isa::set1_i32(pair);
          JAX_GLUON_UNROLL
          for (int c = 0; c < kColumns; ++c) sum[r][c] = Isa::dot_bf16(sum[r][c], x[c], y);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int c = 0; c < kColumns; ++c) Isa::store(sums_of(quad, part, r, c), sum[r][c]);
      if (kColumns == 1 && !kAdds) Isa::store(sums_of(quad, part, r, 1), Isa::zero());
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
