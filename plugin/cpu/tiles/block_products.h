// Register-tile products of cores with blocks: as `multiply_panel` and `multiply_values` of
// microkernel.h, in 2 x 2 accumulators that become rows at the end.
#pragma once

#include "cpu/simd/compiler.h"
#include "cpu/tiles/block_cores.h"

namespace jax_gluon::cpu {
namespace {

// The sums of a tile: sum[i][j] is of rows 2 i and 2 i + 1, columns 2 j and 2 j + 1.
template <class Core>
struct BlockSums {
  using Isa = typename Core::Isa;
  using Block = typename Core::Block;
  static constexpr int kRows = Core::kTileRows / 2, kColumns = Core::kTileColumns / 2;
  Block sum[kRows][kColumns];

  JAX_GLUON_INLINE BlockSums() {
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] = Isa::zero_row();
    }
  }

  static JAX_GLUON_INLINE void load(const typename Core::Lane* lanes, Block* out) {
    JAX_GLUON_UNROLL
    for (int i = 0; i < kColumns; ++i) out[i] = Isa::load_row(lanes + 2 * i);
  }

  JAX_GLUON_INLINE void rows(typename Core::Accumulator (*acc)[Isa::kTileVectors]) const {
    static_assert(kColumns == 4 && Isa::kTileVectors == 1, "a row is a vector of four blocks");
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Block low[2], high[2];
      Isa::zip_halves(sum[i][0], sum[i][1], low);
      Isa::zip_halves(sum[i][2], sum[i][3], high);
      acc[2 * i][0] = Core::row_of(low[0], high[0]);
      acc[2 * i + 1][0] = Core::row_of(low[1], high[1]);
    }
  }
};

template <class Core>
JAX_GLUON_INLINE void multiply_panel_blocks(
    const typename Core::Lane* rows, const typename Core::Lane* panel, int64_t lanes,
    typename Core::Accumulator (*acc)[Core::Isa::kTileVectors]) {
  using Sums = BlockSums<Core>;
  constexpr int R = Core::kTileRows, C = Core::kTileColumns;
  static_assert(R == C, "one load for both");
  Sums sums;
  JAX_GLUON_UNROLL_FOUR
  for (int64_t d = 0; d < lanes; ++d, rows += R, panel += C) {
    typename Core::Block query[Sums::kRows], key[Sums::kColumns];
    Sums::load(rows, query);
    Sums::load(panel, key);
    JAX_GLUON_UNROLL
    for (int i = 0; i < Sums::kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int j = 0; j < Sums::kColumns; ++j) {
        sums.sum[i][j] = Core::multiply_keys(sums.sum[i][j], query[i], key[j]);
      }
    }
  }
  sums.rows(acc);
}

// Rows of p, kStride apart, as blocks: lanes of rows 2 i and 2 i + 1 take turns in row 2 i, and go
// on in row 2 i + 1. Values are multiplied with them in every panel, so that it pays to do it
// before.
template <class Core, int kStride>
void pair_rows(const typename Core::Lane* p, int64_t rows, int64_t lanes,
               typename Core::Lane* out) {
  using Isa = typename Core::Isa;
  for (int64_t r = 0; r < rows; r += 2, p += 2 * kStride, out += 2 * kStride) {
    for (int64_t d = 0; d < lanes; d += 2) {
      typename Core::Block pair[2];
      Isa::zip_halves(Isa::load_row(p + d), Isa::load_row(p + kStride + d), pair);
      Isa::store_row(out + 2 * d, pair[0]);
      Isa::store_row(out + 2 * d + 2, pair[1]);
    }
  }
}

// Rows of probabilities, kStride apart, as value_tile reads them: those of a group, from lane
// `begin` to `end`.
template <class Core, int kStride>
class ValueRows {
  using Lane = typename Core::Lane;

 public:
  ValueRows(const Lane* p, int64_t begin, int64_t end) : rows_(p) {
    if constexpr (Core::kHasBlocks) {
      pair_rows<Core, kStride>(p + begin, Core::kGroupRows, end - begin, pairs_ + 2 * begin);
    }
  }
  // Those of the tile whose first row is r, from a lane on.
  const Lane* tile(int64_t r, int64_t lane) const {
    if constexpr (Core::kHasBlocks) return pairs_ + r * kStride + 2 * lane;
    return rows_ + r * kStride + lane;
  }

 private:
  const Lane* rows_;
  Lane pairs_[Core::kHasBlocks ? Core::kGroupRows * kStride : 1];
};

// Of such pairs of rows.
template <class Core, int kStride>
JAX_GLUON_INLINE void multiply_values_blocks(
    const typename Core::Lane* p, const typename Core::Lane* panel, int64_t lanes,
    typename Core::Accumulator (*acc)[Core::Isa::kTileVectors]) {
  using Isa = typename Core::Isa;
  using Sums = BlockSums<Core>;
  constexpr int C = Core::kTileColumns;
  Sums sums;
  JAX_GLUON_UNROLL_FOUR
  for (int64_t d = 0; d < lanes; ++d, p += 2, panel += C) {
    typename Core::Block probability[Sums::kRows], value[Sums::kColumns];
    JAX_GLUON_UNROLL
    for (int i = 0; i < Sums::kRows; ++i) probability[i] = Isa::load_row(p + 2 * i * kStride);
    Sums::load(panel, value);
    JAX_GLUON_UNROLL
    for (int i = 0; i < Sums::kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int j = 0; j < Sums::kColumns; ++j) {
        sums.sum[i][j] = Core::multiply_values(sums.sum[i][j], probability[i], value[j]);
      }
    }
  }
  sums.rows(acc);
}

}  // namespace
}  // namespace jax_gluon::cpu
