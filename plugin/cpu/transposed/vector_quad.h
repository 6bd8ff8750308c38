// The products of tile_quad.h without tile registers: elements of the left operand are broadcast,
// lanes are columns of the right one.
#pragma once

#include "cpu/transposed/tile_quad.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class VectorQuadWork {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  using I = typename Isa::I;
  using Kind = TileQuad::Kind;
  // Rows of sums that are in registers at once, two vectors each: parts of a tile.
  static constexpr int kRows = 8, kTileParts = 16 / kRows;
  static constexpr int64_t kParts = 2 * kTileParts;
  static constexpr int64_t kRoom = 32;
  static_assert(Core::kArithmetic == Arithmetic::kBf16);

 public:
  void add(const TileQuad& quad) {
    if (count_ == kRoom) finish();
    quads_[count_++] = quad;
    left_ += kParts;
  }
  void finish() { run(left_); }
  // An even share of what is left, where `steps` are left, this one among them.
  void advance(int64_t steps) {
    if (left_ > 0) run(ceil_div(left_, steps));
  }

 private:
  void run(int64_t parts) {
    left_ -= parts;
    for (; parts > 0; --parts) {
      multiply(quads_[done_], part_);
      if (++part_ == kParts) {
        part_ = 0;
        ++done_;
      }
    }
    if (left_ == 0) count_ = done_ = 0;
  }

  static void multiply(const TileQuad& quad, int64_t part) {
    const int64_t tile = part / kTileParts, row = part % kTileParts * kRows;
    char* first_sum = static_cast<char*>(quad.sums.first) + tile * quad.sums.next_row;
    const auto sums = [&](int64_t r, int64_t column) {
      return reinterpret_cast<float*>(first_sum + column * quad.sums.next_column +
                                      (row + r) * quad.sums.stride);
    };
    F sum[kRows][2];
    const bool adds = quad.kind == Kind::kAddedProducts;
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
      for (int64_t lane = 0; lane < 16; ++lane) {
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

  TileQuad quads_[kRoom] = {};
  int64_t count_ = 0, done_ = 0, part_ = 0;  // quads, those done, parts of the next that are done
  int64_t left_ = 0;                         // parts
};

}  // namespace
}  // namespace jax_gluon::cpu
