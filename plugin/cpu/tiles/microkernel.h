// Register-tile matrix products; everything else in a kernel is built around these. Each is kept
// out of line: inlined into a driver its accumulators spill.
#pragma once

#include "cpu/simd/compiler.h"
#include "cpu/tiles/block_products.h"
#include "cpu/tiles/cores.h"

namespace jax_gluon::cpu {
namespace {

// acc[r][c] = sum over lanes of row tile[r] . score panel[c], for one tile of R x C.
template <class Core>
JAX_GLUON_INLINE void multiply_panel(const typename Core::Lane* rows,
                                     const typename Core::Lane* panel, int64_t lanes,
                                     typename Core::Accumulator (*acc)[Core::Isa::kTileVectors]) {
  using Isa = typename Core::Isa;
  constexpr int R = Core::kTileRows, NV = Isa::kTileVectors, W = Isa::kLanes, J = Isa::kRowLanes;
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = Core::zero();
  }
  // Several steps a round where rows are read in lanes: there the products are few.
  if constexpr (J > 1) {
    JAX_GLUON_UNROLL_FOUR
    for (int64_t d = 0; d < lanes; ++d, rows += R, panel += NV * W) {
      typename Core::Vector key[NV];
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v) key[v] = Core::load(panel + v * W);
      decltype(Isa::load_row(rows)) query[R / J];
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; r += J) query[r / J] = Isa::load_row(rows + r);
      repeat<R>([&](auto r) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v) {
          acc[r][v] = Core::template dot_keys<r % J>(acc[r][v], key[v], query[r / J]);
        }
      });
    }
  } else {
    for (int64_t d = 0; d < lanes; ++d, rows += R, panel += NV * W) {
      typename Core::Vector key[NV];
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v) key[v] = Core::load(panel + v * W);
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; ++r) {
        const typename Core::Vector query = Core::broadcast(rows[r]);
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = Core::dot_keys(acc[r][v], key[v], query);
      }
    }
  }
}

// scores[r][c] = sum over lanes of row tile[r] . score panel[c], for one tile of R x C. `scores`
// holds the accumulator type (float or int32), rows `stride` apart.
template <class Core>
JAX_GLUON_NOINLINE void score_tile(const typename Core::Lane* rows,
                                   const typename Core::Lane* panel, int64_t lanes, void* scores,
                                   int64_t stride) {
  constexpr int R = Core::kTileRows, NV = Core::Isa::kTileVectors, W = Core::Isa::kLanes;
  typename Core::Accumulator acc[R][NV];
  if constexpr (Core::kHasBlocks) {
    const auto multiply = [](auto sum, auto x, auto y) { return Core::multiply_keys(sum, x, y); };
    multiply_blocks<Core>(rows, panel, lanes, multiply, acc);
  } else {
    multiply_panel<Core>(rows, panel, lanes, acc);
  }
  char* out = static_cast<char*>(scores);
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) Core::store(out + 4 * (r * stride + v * W), acc[r][v]);
  }
}

// Of rows whose log-sum-exp is known.
template <int kRows>
struct RowStatistics {
  float maximum[kRows], log2_sum[kRows];
};

// One tile of P, from scaled products in base 2, or of dP, where P stands in `p`, rows kStride
// apart: what becomes of the products of row tiles and score panels before they leave the
// registers. Lanes of the rows' sums, of P or of P dP, are added to `sums`. In float32, the
// arithmetic is probability_row's.
template <class Core, bool kIsGradient, int kStride>
JAX_GLUON_NOINLINE void backward_tile(const float* rows, const float* panel, int64_t lanes,
                                      const RowStatistics<Core::kTileRows>& statistics,
                                      const float* p, float* out, float* sums) {
  using Isa = typename Core::Isa;
  constexpr int R = Core::kTileRows, NV = Isa::kTileVectors, W = Isa::kLanes;
  typename Isa::F acc[R][NV];
  multiply_panel<Core>(rows, panel, lanes, acc);
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    auto sum = Isa::load(sums + r * W);
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) {
      if constexpr (kIsGradient) {
        const auto probability = Isa::load(p + r * kStride + v * W);
        // Hidden keys have P = 0 exactly; their dP may be NaN.
        const auto term = Isa::mul(probability, acc[r][v]);
        sum = Isa::add(sum, Isa::where_nonzero(probability, term));
      } else {
        // In this order: log2_sum would vanish in a large maximum.
        const auto below = Isa::sub(acc[r][v], Isa::set1(statistics.maximum[r]));
        acc[r][v] = Isa::template exp2<5>(Isa::sub(below, Isa::set1(statistics.log2_sum[r])));
        sum = Isa::add(sum, acc[r][v]);
      }
      Isa::store(out + r * kStride + v * W, acc[r][v]);
    }
    Isa::store(sums + r * W, sum);
  }
}

// acc[r][c] = sum over lanes of p[r][lane] * value panel[lane][c].
template <class Core, int kStride>
JAX_GLUON_INLINE void multiply_values(const typename Core::Lane* p,
                                      const typename Core::Lane* panel, int64_t lanes,
                                      typename Core::Accumulator (*acc)[Core::Isa::kTileVectors]) {
  using Isa = typename Core::Isa;
  constexpr int R = Core::kTileRows, NV = Isa::kTileVectors, W = Isa::kLanes, J = Isa::kRowLanes;
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = Core::zero();
  }
  constexpr bool kShifts = Core::kArithmetic == Arithmetic::kInt8 && Isa::kShiftsProbabilities;
  [[maybe_unused]] typename Core::Accumulator shift[NV];
  if constexpr (kShifts) {
    for (int v = 0; v < NV; ++v) shift[v] = Core::zero();
  }
  // Where J lanes of a row are loaded at once none is left: keys come in whole panels.
  for (int64_t j = 0; j < lanes; j += J) {
    if constexpr (J > 1) {
      decltype(Isa::load_row(p)) row[R];
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; ++r) row[r] = Core::load_probabilities(p + r * kStride + j);
      repeat<J>([&](auto lane) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v, panel += W) {
          const typename Core::Vector value = Core::load(panel);
          if constexpr (kShifts) shift[v] = Isa::add_shift(shift[v], value);
          JAX_GLUON_UNROLL
          for (int r = 0; r < R; ++r) {
            acc[r][v] = Core::template dot_values<lane>(acc[r][v], value, row[r]);
          }
        }
      });
    } else {
      typename Core::Vector value[NV];
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v, panel += W) value[v] = Core::load(panel);
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; ++r) {
        const typename Core::Vector probability = Core::broadcast(p[r * kStride + j]);
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = Core::dot_values(acc[r][v], value[v], probability);
      }
    }
  }
  if constexpr (kShifts) {
    JAX_GLUON_UNROLL
    for (int r = 0; r < R; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] = Isa::without_shift(acc[r][v], shift[v]);
    }
  }
}

// out[r][c] = out[r][c] * factor[r] + sum over lanes of p[r][lane] * value panel[lane][c] where the
// sum is float; out[r][c] += factor[r] * sum where it is int32. The tile's sum starts at zero: each
// product added to `out` would be rounded at the size of the sum over all keys.
template <class Core, int kStride>
JAX_GLUON_NOINLINE void value_tile(const typename Core::Lane* p, const typename Core::Lane* panel,
                                   int64_t lanes, float* out, int64_t out_stride,
                                   const float* factor) {
  using Isa = typename Core::Isa;
  constexpr int R = Core::kTileRows, NV = Isa::kTileVectors, W = Isa::kLanes;
  constexpr bool kFloat = Core::kArithmetic != Arithmetic::kInt8;
  typename Core::Accumulator acc[R][NV];
  if constexpr (Core::kHasBlocks) {
    const auto multiply = [](auto sum, auto x, auto y) { return Core::multiply_values(sum, x, y); };
    multiply_blocks<Core>(p, panel, lanes, multiply, acc);
  } else {
    multiply_values<Core, kStride>(p, panel, lanes, acc);
  }
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) {
      float* o = out + r * out_stride + v * W;
      if constexpr (kFloat) {
        Isa::store(o, Isa::fma(Isa::load(o), Isa::set1(factor[r]), acc[r][v]));
      } else {
        Isa::store(o, Isa::fma(Isa::to_float(acc[r][v]), Isa::set1(factor[r]), Isa::load(o)));
      }
    }
  }
}

// out[r][c] += sum over j of a[j][r] * panel[j][c] (float32): the transposed left operand of dK =
// dS^T Q and dV = P^T dO, rows of `a` kStride apart. Summed as in value_tile.
template <class Isa, int kStride>
JAX_GLUON_NOINLINE void transposed_tile(const float* a, const float* panel, int64_t rows,
                                        float* out, int64_t out_stride) {
  constexpr int R = Isa::kTileRows, NV = Isa::kTileVectors, W = Isa::kLanes, J = Isa::kRowLanes;
  typename Isa::F acc[R][NV];
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = Isa::zero();
  }
  if constexpr (J > 1) {
    JAX_GLUON_UNROLL_FOUR
    for (int64_t j = 0; j < rows; ++j, a += kStride, panel += NV * W) {
      typename Isa::F right[NV];
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v) right[v] = Isa::load(panel + v * W);
      decltype(Isa::load_row(a)) left[R / J];
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; r += J) left[r / J] = Isa::load_row(a + r);
      repeat<R>([&](auto r) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v) {
          acc[r][v] = Isa::template fma_lane<r % J>(acc[r][v], right[v], left[r / J]);
        }
      });
    }
  } else {
    for (int64_t j = 0; j < rows; ++j, a += kStride, panel += NV * W) {
      typename Isa::F right[NV];
      JAX_GLUON_UNROLL
      for (int v = 0; v < NV; ++v) right[v] = Isa::load(panel + v * W);
      JAX_GLUON_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto left = Isa::set1(a[r]);
        JAX_GLUON_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][v] = Isa::fma(right[v], left, acc[r][v]);
      }
    }
  }
  JAX_GLUON_UNROLL
  for (int r = 0; r < R; ++r) {
    JAX_GLUON_UNROLL
    for (int v = 0; v < NV; ++v) {
      float* o = out + r * out_stride + v * W;
      Isa::store(o, Isa::add(Isa::load(o), acc[r][v]));
    }
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
