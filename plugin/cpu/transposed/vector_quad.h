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
    const int64_t tile = part / kTileParts, row = part % kTileParts * kRows;
    char* first_sum = static_cast<char*>(quad.sums.first) + tile * quad.sums.next_row;
    const auto sums = [&](int64_t r, int64_t column) {
      return reinterpret_cast<float*>(first_sum + column * quad.sums.next_column +
                                      (row + r) * quad.sums.stride);
    };
    F sum[kRows][2];
    const bool adds = quad.kind == TileQuad::Kind::kAddedProducts;
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = adds ? Isa::load(sums(r, 0)) : Isa::zero();
      sum[r][1] = adds ? Isa::load(sums(r, 1)) : Isa::zero();
    }
    const int64_t stride = quad.left.stride;
    const char* left =
        static_cast<const char*>(quad.left.first) + tile * quad.left.next + row * stride;
    const char* right = static_cast<const char*>(quad.right.first);
    for (int64_t step = 0; step < quad.steps;
         ++step, left += quad.left.step, right += quad.right.step) {
      for (int64_t lane = 0; lane < kTileQueries; ++lane) {
        const char* line = right + lane * quad.right.stride;
        const I x0 = Isa::load_i32(line), x1 = Isa::load_i32(line + quad.right.next);
        JAX_GLUON_UNROLL
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          std::memcpy(&pair, left + r * stride + 4 * lane, sizeof pair);
          const I y = Isa::set1_i32(pair);
          sum[r][0] = Isa::dot_bf16(sum[r][0], x0, y);
          sum[r][1] = Isa::dot_bf16(sum[r][1], x1, y);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Isa::store(sums(r, 0), sum[r][0]);
      Isa::store(sums(r, 1), sum[r][1]);
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
