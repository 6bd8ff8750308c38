// Register-tile products of cores with blocks: as `multiply_panel` and `multiply_values` of
// microkernel.h, in 2 x 2 accumulators that become rows at the end.
#pragma once

#include "cpu/simd/compiler.h"
#include "cpu/tiles/block_cores.h"

namespace jax_gluon::cpu {
namespace {

// acc[r][c] = sum over lanes of row tile[r] . panel[c]: `multiply` adds the products of a block of
// rows and one of columns to 2 x 2 sums.
template <class Core, class Multiply>
JAX_GLUON_INLINE void multiply_blocks(const typename Core::Lane* rows,
                                      const typename Core::Lane* panel, int64_t lanes,
                                      Multiply multiply,
                                      typename Core::Accumulator (*acc)[Core::Isa::kTileVectors]) {
  using Isa = typename Core::Isa;
  using Block = typename Core::Block;
  constexpr int R = Core::kTileRows, C = Core::kTileColumns;
  static_assert(R % 4 == 0 && C == 8 && Isa::kTileVectors == 1, "a row is a vector of 4 blocks");
  Block sum[R / 2][C / 2];
  JAX_GLUON_UNROLL
  for (int i = 0; i < R / 2; ++i) {
    JAX_GLUON_UNROLL
    for (int j = 0; j < C / 2; ++j) sum[i][j] = Isa::zero_row();
  }
  JAX_GLUON_UNROLL_FOUR
  for (int64_t d = 0; d < lanes; ++d, rows += R, panel += C) {
    Block right[C / 2];
    JAX_GLUON_UNROLL
    for (int j = 0; j < C / 2; ++j) right[j] = Isa::load_row(panel + 2 * j);
    // Two blocks of rows at a time: all of them would push sums out of the registers.
    JAX_GLUON_UNROLL
    for (int i = 0; i < R / 2; i += 2) {
      const Block left[2] = {Isa::load_row(rows + 2 * i), Isa::load_row(rows + 2 * i + 2)};
      JAX_GLUON_UNROLL
      for (int k = 0; k < 2; ++k) {
        JAX_GLUON_UNROLL
        for (int j = 0; j < C / 2; ++j) sum[i + k][j] = multiply(sum[i + k][j], left[k], right[j]);
      }
    }
  }
  JAX_GLUON_UNROLL
  for (int i = 0; i < R / 2; ++i) {
    Block low[2], high[2];
    Isa::zip_halves(sum[i][0], sum[i][1], low);
    Isa::zip_halves(sum[i][2], sum[i][3], high);
    acc[2 * i][0] = Core::row_of(low[0], high[0]);
    acc[2 * i + 1][0] = Core::row_of(low[1], high[1]);
  }
}

// Lanes of R rows of p, kStride apart, as a row tile. Values are multiplied with it in every panel,
// so that it pays to make it before.
template <class Core, int kStride>
void to_row_tile(const typename Core::Lane* p, int64_t lanes, typename Core::Lane* out) {
  using Isa = typename Core::Isa;
  constexpr int R = Core::kTileRows;
  for (int r = 0; r < R; r += 2, p += 2 * kStride, out += 2) {
    for (int64_t d = 0; d < lanes; d += 2) {
      typename Core::Block pair[2];
      Isa::zip_halves(Isa::load_row(p + d), Isa::load_row(p + kStride + d), pair);
      Isa::store_row(out + d * R, pair[0]);
      Isa::store_row(out + (d + 1) * R, pair[1]);
    }
  }
}

// Rows of probabilities, kStride apart, as value_tile reads them: those of a group, from lane
// `begin` to `end`.
template <class Core, int kStride>
class ValueRows {
  using Lane = typename Core::Lane;
  static constexpr int R = Core::kTileRows;

 public:
  ValueRows(const Lane* p, int64_t begin, int64_t end) : rows_(p) {
    if constexpr (Core::kHasBlocks) {
      for (int64_t r = 0; r < Core::kGroupRows; r += R) {
        to_row_tile<Core, kStride>(p + r * kStride + begin, end - begin,
                                   tiles_ + r * kStride + begin * R);
      }
    }
  }
  // Those of the tile whose first row is r, from a lane on.
  const Lane* tile(int64_t r, int64_t lane) const {
    if constexpr (Core::kHasBlocks) return tiles_ + r * kStride + lane * R;
    return rows_ + r * kStride + lane;
  }

 private:
  const Lane* rows_;
  Lane tiles_[Core::kHasBlocks ? Core::kGroupRows * kStride : 1];
};

}  // namespace
}  // namespace jax_gluon::cpu
