// Matrix products of plain rows, in register tiles that shrink to fit what is left of the rows.
#pragma once

#include <algorithm>

#include "cpu/rows/rows.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

// Element (r, d) is data[r * row + d * step].
struct LeftOperand {
  const float* data;
  int64_t rows, row, step;
};

// Element (d, c) is data[c / panel * panel_stride + d * stride + c % panel], where a panel is as
// wide as a tile. Of plain rows panel_stride is that width.
struct RightOperand {
  const float* data;
  int64_t depth, stride, panel_stride;
};

// out[r][c] (+)= sum over d of left (r, d) * right (d, c), c in whole vectors.
template <class Isa>
class SmallProduct {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;
  static constexpr int kTileRows = Isa::kTileRows, kTileVectors = Isa::kTileVectors;
  // Products that are added one after the other where all of them are: the sums of longer ones are
  // added in parts of at most kMaxPart, which halves the rounding of 197.
  static constexpr int64_t kMaxSum = 32, kMaxPart = 20;

 public:
  static constexpr int64_t kPanel = kTileVectors * W;

  static RightOperand plain(const float* rows, int64_t depth, int64_t stride) {
    return {rows, depth, stride, kPanel};
  }

  template <bool kAdd = false>
  static void run(LeftOperand a, RightOperand b, int64_t columns, float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + kPanel <= columns; c += kPanel, b.data += b.panel_stride) {
      run_rows<kTileRows, kTileVectors, kAdd>(a, b, out + c, out_stride);
    }
    if constexpr (kTileVectors > 1) {
      static_assert(kTileVectors == 2, "one vector is left");
      if (c < columns) run_rows<8, 1, kAdd>(a, b, out + c, out_stride);
    }
  }

 private:
  // The rows of the next smaller tile.
  static constexpr int fewer(int rows) { return rows > 8 ? 8 : rows > 4 ? 4 : rows / 2; }

  template <int kRows, int kVectors, bool kAdd>
  static void run_rows(LeftOperand a, const RightOperand& b, float* out, int64_t out_stride) {
    for (; a.rows >= kRows; a.rows -= kRows, a.data += kRows * a.row, out += kRows * out_stride) {
      tile<kRows, kVectors, kAdd>(a, b, out, out_stride);
    }
    if constexpr (kRows > 1) {
      if (a.rows > 0) run_rows<fewer(kRows), kVectors, kAdd>(a, b, out, out_stride);
    }
  }

  template <int kRows, int kVectors, bool kAdd>
  static JAX_GLUON_NOINLINE void tile(const LeftOperand& left, const RightOperand& right,
                                      float* out, int64_t out_stride) {
    const float *a = left.data, *b = right.data;
    const int64_t parts = right.depth <= kMaxSum ? 1 : ceil_div(right.depth, kMaxPart);
    const int64_t size = ceil_div(right.depth, parts);
    for (int64_t first = 0, part = 0; part < parts; first += size, ++part) {
      F acc[kRows][kVectors];
      JAX_GLUON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
      }
      const int64_t count = std::min(size, right.depth - first);
      for (int64_t d = 0; d < count; ++d, a += left.step, b += right.stride) {
        F x[kVectors];
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) x[v] = Isa::load(b + v * W);
        JAX_GLUON_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const F y = Isa::set1(a[r * left.row]);
          JAX_GLUON_UNROLL
          for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::fma(x[v], y, acc[r][v]);
        }
      }
      const bool adds = kAdd || part > 0;
      JAX_GLUON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          float* at = out + r * out_stride + v * W;
          Isa::store(at, adds ? Isa::add(Isa::load(at), acc[r][v]) : acc[r][v]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
