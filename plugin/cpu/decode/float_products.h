// Products in float32 with rows of floats, or of codes, for attention of a few queries: a row is
// read as it is stored and unpacked in registers.
#pragma once

#include <algorithm>

#include "cpu/rows/rows.h"
#include "cpu/simd/compiler.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, DType dtype>
struct FloatProducts {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;
  static constexpr bool kNibbles = dtype == DType::kU4x2;
  // Elements of a row that are unpacked at a time. Where a byte holds two, the first vector takes
  // the even and the second the odd ones, and whatever meets them is stored in that order.
  static constexpr int kVectors = kNibbles ? 2 : 1;
  static constexpr int64_t kStep = kVectors * W;
  // Keys whose scores are alive at once, at most: those of a query are this far from the next
  // one's.
  static constexpr int64_t kMaxKeys = 64;

  static constexpr int64_t bytes(int64_t elements) {
    return kNibbles ? elements / 2 : elements * static_cast<int64_t>(size_of(dtype));
  }
  // Where element h of a query, or of a sum of values, stands.
  static constexpr int64_t query_position(int64_t h) {
    if constexpr (!kNibbles) return h;
    return h / kStep * kStep + h % 2 * W + h % kStep / 2;
  }
  static constexpr int64_t value_position(int64_t h) { return query_position(h); }

  // Vectors of a step from their natural order.
  static JAX_GLUON_INLINE void put_in_order(F* x) {
    if constexpr (kNibbles) Isa::deinterleave(x[0], x[1], x);
  }

  struct Queries {
    const float* data;  // rows of whole steps, `stride` apart
    int64_t stride, count, width;
    const float* constant;  // added to the scores of each
  };

  // scores[r][j] = query r . row j + constant[r].
  static void dot(const StoredRows& rows, const Queries& queries, float* scores) {
    int64_t r = 0;
    for (; r + 4 <= queries.count; r += 4) dot_queries<4>(rows, queries, r, scores);
    for (; r < queries.count; ++r) dot_queries<1>(rows, queries, r, scores);
  }

  // What rows are multiplied with: [queries][kMaxKeys][groups].
  struct Weights {
    const float* data;
    int64_t groups, group_size;  // of the elements of a row
    // Whether a weight of 0 takes away what is not finite.
    bool guards;
  };
  struct Sums {
    float* data;  // rows of whole steps, `stride` apart
    int64_t stride, count, width;
  };

  // Adds the sum over rows j of weights[r][j] * row j to each sum r.
  static void add_rows(const StoredRows& rows, const Weights& weights, const Sums& sums) {
    // Several steps of a row, or fewer of several rows: sums that the registers hold.
    constexpr int kMany = 4 / kVectors, kFew = 2 / kVectors;
    const int64_t whole = round_up(sums.width, kStep);
    const bool guards = weights.guards;
    int64_t steps = 1;
    for (int64_t h = 0; h < whole; h += steps * kStep) {
      int64_t r = 0;
      if (!guards && sums.count >= 4 && h + kFew * kStep <= whole) {
        steps = kFew;
        for (; r + 4 <= sums.count; r += 4) add_tile<4, kFew, false>(rows, weights, sums, r, h);
        for (; r < sums.count; ++r) add_tile<1, kFew, false>(rows, weights, sums, r, h);
      } else if (!guards && h + kMany * kStep <= whole) {
        steps = kMany;
        for (; r < sums.count; ++r) add_tile<1, kMany, false>(rows, weights, sums, r, h);
      } else {
        steps = 1;
        for (; !guards && r + 4 <= sums.count; r += 4) {
          add_tile<4, 1, false>(rows, weights, sums, r, h);
        }
        for (; r < sums.count; ++r) {
          guards ? add_tile<1, 1, true>(rows, weights, sums, r, h)
                 : add_tile<1, 1, false>(rows, weights, sums, r, h);
        }
      }
    }
  }

 private:
  // The step that starts at `row`.
  static void load(const char* row, F* out) {
    if constexpr (kNibbles) {
      Isa::load_nibbles(reinterpret_cast<const uint8_t*>(row), &out[0], &out[1]);
    } else {
      out[0] = load_vector<Isa, dtype>(row);
    }
  }

  // Queries r, r + 1...
  template <int kQueries>
  static void dot_queries(const StoredRows& rows, const Queries& queries, int64_t r,
                          float* scores) {
    // As many as the registers hold sums of.
    constexpr int kMany = kVectors == 1 ? 3 : 1;
    int64_t j = 0;
    for (; j + kMany <= rows.count; j += kMany) {
      dot_tile<kQueries, kMany>(rows, queries, r, j, scores);
    }
    for (; j < rows.count; ++j) dot_tile<kQueries, 1>(rows, queries, r, j, scores);
  }

  template <int kQueries, int kRows>
  static void dot_tile(const StoredRows& rows, const Queries& queries, int64_t r, int64_t j,
                       float* scores) {
    const char* row = rows.data + j * rows.stride;
    const float* query = queries.data + r * queries.stride;
    const int64_t whole = round_up(queries.width, kStep);
    F acc[kQueries][kRows][kVectors];
    JAX_GLUON_UNROLL
    for (int i = 0; i < kQueries; ++i) {
      JAX_GLUON_UNROLL
      for (int k = 0; k < kRows; ++k) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[i][k][v] = Isa::zero();
      }
    }
    for (int64_t h = 0; h < whole; h += kStep) {
      F x[kRows][kVectors];
      JAX_GLUON_UNROLL
      for (int k = 0; k < kRows; ++k) load(row + k * rows.stride + bytes(h), x[k]);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kQueries; ++i) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const F left = Isa::load(query + i * queries.stride + h + v * W);
          JAX_GLUON_UNROLL
          for (int k = 0; k < kRows; ++k) acc[i][k][v] = Isa::fma(x[k][v], left, acc[i][k][v]);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int i = 0; i < kQueries; ++i) {
      JAX_GLUON_UNROLL
      for (int k = 0; k < kRows; ++k) {
        F total = acc[i][k][0];
        if constexpr (kVectors == 2) total = Isa::add(total, acc[i][k][1]);
        scores[(r + i) * kMaxKeys + j + k] = Isa::reduce_add(total) + queries.constant[r + i];
      }
    }
  }

  // Sums r, r + 1..., of kSteps steps from element h on.
  template <int kSums, int kSteps, bool kGuards>
  static void add_tile(const StoredRows& rows, const Weights& weights, const Sums& sums, int64_t r,
                       int64_t h) {
    const int64_t groups = weights.groups;
    const float* weight_of_step[kSteps];
    for (int i = 0; i < kSteps; ++i) {
      const int64_t element = std::min(h + i * kStep, sums.width - 1);
      const int64_t group = groups == 1 ? 0 : element / weights.group_size;
      weight_of_step[i] = weights.data + r * kMaxKeys * groups + group;
    }
    const char* row = rows.data + bytes(h);
    float* out = sums.data + r * sums.stride + h;
    F acc[kSums][kSteps * kVectors];
    JAX_GLUON_UNROLL
    for (int s = 0; s < kSums; ++s) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kSteps * kVectors; ++v) {
        acc[s][v] = Isa::load(out + s * sums.stride + v * W);
      }
    }
    for (int64_t j = 0; j < rows.count; ++j, row += rows.stride) {
      JAX_GLUON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        F x[kVectors];
        load(row + bytes(i * kStep), x);
        JAX_GLUON_UNROLL
        for (int s = 0; s < kSums; ++s) {
          const F weight = Isa::set1(weight_of_step[i][(s * kMaxKeys + j) * groups]);
          JAX_GLUON_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            F& a = acc[s][i * kVectors + v];
            // The same bits with and without the guard.
            a = Isa::fma(kGuards ? Isa::where_nonzero(weight, x[v]) : x[v], weight, a);
          }
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int s = 0; s < kSums; ++s) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kSteps * kVectors; ++v) {
        Isa::store(out + s * sums.stride + v * W, acc[s][v]);
      }
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
