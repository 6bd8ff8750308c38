// Float rows into the layouts of tile_cores.h.
#pragma once

#include <cstring>

#include "cpu/tiles/pack.h"
#include "cpu/transposed/tile_cores.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
struct TransposedPack {
  using F = typename Isa::F;
  static constexpr int W = kTileQueries;
  static_assert(Isa::kLanes == W);

  // out[c][r] = in[r][c] of 16 x 16 lanes.
  static void turn(const float* in, int64_t stride, float* out, int64_t out_stride) {
    F x[W];
    for (int r = 0; r < W; ++r) x[r] = Isa::load(in + r * stride);
    transpose<Isa>(x);
    for (int r = 0; r < W; ++r) Isa::store(out + r * out_stride, x[r]);
  }

  // 32 rows as tiles whose rows are columns: an element of each row.
  static void pack_columns(const float* rows, int64_t columns, uint32_t* out) {
    for (int64_t tile = 0; tile < columns; tile += W, out += W * W) {
      F x[W];
      for (int64_t g = 0; g < W; ++g) {
        const float* pair = rows + 2 * g * columns + tile;
        const auto both = Isa::interleave_bf16(Isa::load(pair), Isa::load(pair + columns));
        std::memcpy(&x[g], &both, sizeof both);
      }
      transpose<Isa>(x);
      for (int64_t c = 0; c < W; ++c) std::memcpy(out + c * W, &x[c], sizeof x[c]);
    }
  }
  // 32 rows as tiles whose rows are pairs of them: a lane has two of a column.
  static void pack_pairs(const float* rows, int64_t columns, uint32_t* out) {
    for (int64_t tile = 0; tile < columns; tile += W) {
      for (int64_t g = 0; g < W; ++g, out += W) {
        const float* pair = rows + 2 * g * columns + tile;
        Isa::store_i32(out, Isa::interleave_bf16(Isa::load(pair), Isa::load(pair + columns)));
      }
    }
  }
  // A row of whole tiles as bfloat16, in order.
  static void pack_row(const float* row, int64_t columns, uint32_t* out) {
    for (int64_t c = 0; c < columns; c += 2 * W, out += W) {
      Isa::store_bf16_pair(out, Isa::load(row + c), Isa::load(row + c + W));
    }
  }
  // 16 rows of lanes as a right operand: [lanes][16].
  static void pack_right(const uint32_t* rows, int64_t lanes, uint32_t* out) {
    for (int64_t d = 0; d < lanes; d += W) {
      F x[W];
      for (int r = 0; r < W; ++r) std::memcpy(&x[r], rows + r * lanes + d, sizeof x[r]);
      transpose<Isa>(x);
      for (int r = 0; r < W; ++r) std::memcpy(out + (d + r) * W, &x[r], sizeof x[r]);
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
