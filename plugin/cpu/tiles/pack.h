// Rows of operands into the packed layouts of cores.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/simd/compiler.h"
#include "cpu/tiles/cores.h"

namespace jax_gluon::cpu {
namespace {

inline int32_t sum_of(const int8_t* codes, int64_t n) {
  int32_t total = 0;
  for (int64_t h = 0; h < n; ++h) total += codes[h];
  return total;
}

// One row of an operand as lanes, zero-padded; `bias` is added to int8 codes.
template <class Core>
void row_to_lanes(const void* row, DType dtype, int64_t n, int32_t bias, typename Core::Lane* out) {
  constexpr int64_t G = Core::kGroup;
  const int64_t own = ceil_div(n, G), all = row_lanes<Core>(n);
  if constexpr (Core::kLaneStep > 1) std::fill(out + own, out + all, typename Core::Lane(0));
  if constexpr (Core::kArithmetic == Arithmetic::kF32) {
    load_row<typename Core::Isa>(row, dtype, n, out);
  } else if constexpr (Core::kArithmetic == Arithmetic::kBf16) {
    out[own - 1] = 0;
    std::memcpy(out, row, static_cast<size_t>(n) * 2);
  } else {
    const int8_t* code = static_cast<const int8_t*>(row);
    if constexpr (G == 4) {
      // A padded code meets a zero of the other operand, so its bias does not matter.
      out[own - 1] = 0;
      std::memcpy(out, code, static_cast<size_t>(n));
      const uint32_t flip = bias ? 0x80808080u : 0u;
      for (int64_t i = 0; i < own; ++i) out[i] ^= flip;
    } else if constexpr (G == 8) {
      out[own - 1] = 0;
      std::memcpy(out, code, static_cast<size_t>(n));
    } else {
      int16_t* wide = reinterpret_cast<int16_t*>(out);
      for (int64_t i = 0; i < n; ++i) wide[i] = code[i];
      if (n % 2) wide[n] = 0;
    }
  }
}

// Lane c of x[r] changes places with lane r of x[c]. A round moves one bit of the place within a
// vector to the front of the vector's number.
template <class Isa>
JAX_GLUON_INLINE void transpose(typename Isa::F* x) {
  constexpr int W = Isa::kLanes;
  typename Isa::F next[W];
  JAX_GLUON_UNROLL
  for (int round = 1; round < W; round *= 2) {
    JAX_GLUON_UNROLL
    for (int m = 0; m < W / 2; ++m) {
      typename Isa::F pair[2];
      Isa::deinterleave(x[2 * m], x[2 * m + 1], pair);
      next[m] = pair[0];
      next[m + W / 2] = pair[1];
    }
    JAX_GLUON_UNROLL
    for (int m = 0; m < W; ++m) x[m] = next[m];
  }
}

// out[d][r] = rows[r][d] for C rows of 32-bit lanes.
template <class Isa, int C, class Lane>
void interleave(const Lane* rows, int64_t stride, int64_t lanes, Lane* out) {
  constexpr int W = Isa::kLanes;
  int64_t d = 0;
  if constexpr (std::is_same_v<Lane, float> && C % W == 0) {
    for (; d + W <= lanes; d += W) {
      for (int r = 0; r < C; r += W) {
        typename Isa::F x[W];
        for (int i = 0; i < W; ++i) x[i] = Isa::load(rows + (r + i) * stride + d);
        transpose<Isa>(x);
        for (int i = 0; i < W; ++i) Isa::store(out + (d + i) * C + r, x[i]);
      }
    }
  }
  for (; d < lanes; ++d) {
    for (int r = 0; r < C; ++r) out[d * C + r] = rows[r * stride + d];
  }
}

// Rows [begin, end) as score panels; `load(j, lanes)` gives a row. The last panel is padded with
// zero rows. `begin` is a multiple of the panel's C keys; `panels` is where panel begin / C goes.
template <class Core, class Load>
void pack_score_panels(int64_t begin, int64_t end, int64_t n, typename Core::Lane* lanes_of_panel,
                       typename Core::Lane* panels, Load load) {
  constexpr int C = Core::kTileColumns;
  const int64_t lanes = ceil_div(n, Core::kGroup);
  for (int64_t j = begin; j < end; j += C, panels += C * lanes) {
    for (int r = 0; r < C; ++r) {
      typename Core::Lane* out = lanes_of_panel + r * lanes;
      if (j + r < end) {
        load(j + r, out);
      } else {
        std::fill(out, out + lanes, typename Core::Lane(0));
      }
    }
    interleave<typename Core::Isa, C>(lanes_of_panel, lanes, lanes, panels);
  }
}

// Key group (kGroup rows, some possibly null: zero) as one line of lanes in every value panel.
// Panel p's line goes to out + p * panel_stride.
template <class Core, class Element>
void pack_value_line(const Element* const* row, int64_t n, typename Core::Lane* out,
                     int64_t panel_stride) {
  constexpr int C = Core::kTileColumns, G = Core::kGroup;
  using Lane = typename Core::Lane;
  for (int64_t c0 = 0; c0 < n; c0 += C, out += panel_stride) {
    const int64_t columns = std::min<int64_t>(C, n - c0);
    if constexpr (G == 1) {
      if (row[0] && columns == C) {
        for (int c = 0; c < C; c += Core::Isa::kLanes) {
          Core::Isa::store(out + c, Core::Isa::load(row[0] + c0 + c));
        }
      } else if (row[0]) {
        std::copy(row[0] + c0, row[0] + n, out);
      } else {
        std::fill(out, out + columns, Lane(0));
      }
    } else {
      constexpr int kBits = 8 * sizeof(Lane) / G;
      using Bits = std::conditional_t<sizeof(Element) == 1, uint8_t, uint16_t>;
      for (int64_t c = 0; c < columns; ++c) {
        Lane lane = 0;
        for (int g = 0; g < G; ++g) {
          if (!row[g]) continue;
          // An int8 code in a 16-bit field keeps its sign.
          const Lane field =
              kBits == 16 && sizeof(Element) == 1
                  ? static_cast<Lane>(static_cast<uint16_t>(static_cast<int16_t>(row[g][c0 + c])))
                  : static_cast<Lane>(static_cast<Bits>(row[g][c0 + c]));
          lane |= field << (kBits * g);
        }
        out[c] = lane;
      }
    }
    if (columns < C) std::fill(out + columns, out + C, Lane(0));
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
