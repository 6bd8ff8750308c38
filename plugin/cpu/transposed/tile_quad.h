// Products of two by two tiles: each tile that is loaded is multiplied twice. A list of them runs
// at once, or cut into operations between the steps of vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/compiler.h"
#include "cpu/transposed/tile_cores.h"

namespace jax_gluon::cpu {
namespace {

// Two tiles of an operand, `next` apart, and those of the steps after it; in bytes.
struct QuadOperand {
  const void* first;
  int64_t next, step, stride = kTileStride;
};
// Rows of tiles are `next_row` apart, columns `next_column`.
struct QuadSums {
  void* first;
  int64_t next_row, next_column, stride = kTileStride;
};

// What of a quad counts, where tokens end: vectors may leave out the rest, whose sums are then
// zeros or stay as they are; tiles multiply it.
struct QuadExtent {
  int64_t rows = 2 * kTileQueries, columns = 2 * kTileQueries;
  int64_t last = 2 * kTileQueries;  // terms of the last step, which products are summed over
};

// sums = left right over all steps, or sums += it.
struct TileQuad {
  enum class Kind : uint8_t { kScores, kProducts, kAddedProducts };
  Kind kind;
  int64_t steps;
  QuadOperand left, right;
  QuadSums sums;
  QuadExtent extent = {};
};

// A list of quads, each cut into operations: `Steps::count(quad)` of them, which
// `Steps::run(quad, i)` does one after the other.
template <class Steps>
class QuadWork {
  static constexpr int64_t kRoom = 32;

 public:
  void add(const TileQuad& quad) {
    if (count_ == kRoom) finish();
    quads_[count_++] = quad;
    left_ += Steps::count(quad);
  }
  void finish() { run(left_); }
  // An even share of what is left, where `steps` are left, this one among them.
  JAX_GLUON_INLINE void advance(int64_t steps) {
    if (left_ > 0) run(ceil_div(left_, steps));
  }

 private:
  JAX_GLUON_INLINE void run(int64_t operations) {
    left_ -= operations;
    for (; operations > 0; --operations) {
      const TileQuad& quad = quads_[done_];
      Steps::run(quad, at_);
      if (++at_ == Steps::count(quad)) {
        at_ = 0;
        ++done_;
      }
    }
    if (left_ == 0) count_ = done_ = 0;
  }

  TileQuad quads_[kRoom] = {};
  int64_t count_ = 0, done_ = 0, left_ = 0;  // quads, those done, operations that are left
  int64_t at_ = 0;                           // operations of the next quad that are done
};

// On tile registers. `Core` multiplies scores; all else is bfloat16.
template <class Core>
class TileQuadSteps {
  static_assert(Core::Isa::kTileStride == kTileStride);
  using Tile = typename Core::Isa::Tile;
  using Kind = TileQuad::Kind;
  // A row of two tiles each.
  static constexpr int64_t kStores = 2;

 public:
  static int64_t count(const TileQuad& quad) { return quad.steps + kStores; }
  JAX_GLUON_INLINE static void run(const TileQuad& quad, int64_t i) {
    if (i < quad.steps) {
      if (i == 0) start(quad);
      if (quad.kind == Kind::kScores) {
        multiply<Core>(quad, i);
      } else {
        multiply<TransposedBf16Core<typename Core::Isa>>(quad, i);
      }
    } else if (i == quad.steps) {
      store<0>(quad.sums);
    } else {
      store<1>(quad.sums);
    }
  }

 private:
  static char* at(const QuadSums& sums, int64_t row, int64_t column) {
    return static_cast<char*>(sums.first) + row * sums.next_row + column * sums.next_column;
  }
  JAX_GLUON_INLINE static void start(const TileQuad& quad) {
    if (quad.kind == Kind::kAddedProducts) {
      Tile::template load<0>(at(quad.sums, 0, 0), quad.sums.stride);
      Tile::template load<1>(at(quad.sums, 0, 1), quad.sums.stride);
      Tile::template load<2>(at(quad.sums, 1, 0), quad.sums.stride);
      Tile::template load<3>(at(quad.sums, 1, 1), quad.sums.stride);
    } else {
      Tile::template zero<0>();
      Tile::template zero<1>();
      Tile::template zero<2>();
      Tile::template zero<3>();
    }
  }
  template <int row>
  JAX_GLUON_INLINE static void store(const QuadSums& sums) {
    Tile::template store<2 * row>(at(sums, row, 0), sums.stride);
    Tile::template store<2 * row + 1>(at(sums, row, 1), sums.stride);
  }
  template <class Dot>
  JAX_GLUON_INLINE static void multiply(const TileQuad& quad, int64_t step) {
    const QuadOperand &left = quad.left, &right = quad.right;
    const char* a = static_cast<const char*>(left.first) + step * left.step;
    const char* b = static_cast<const char*>(right.first) + step * right.step;
    Tile::template load<4>(a, left.stride);
    Tile::template load<6>(b, right.stride);
    Dot::template dot_keys<0, 4, 6>();
    Tile::template load<7>(b + right.next, right.stride);
    Dot::template dot_keys<1, 4, 7>();
    Tile::template load<5>(a + left.next, left.stride);
    Dot::template dot_keys<2, 5, 6>();
    Dot::template dot_keys<3, 5, 7>();
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
