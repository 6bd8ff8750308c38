// Heads of few queries and few keys: what they have in common, forward and backward. A head is
// computed at once from plain rows, since packing it into whole register tiles, and one task for
// each head, would cost more than its products.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/rows/logit_rules.h"
#include "cpu/simd/compiler.h"
#include "cpu/small/head_rows.h"
#include "cpu/tiles/pack.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// out[r][c] (+)= sum over d < depth of a[r * row + d * step] * b[d][c], c in whole vectors.
struct LeftOperand {
  const float* data;
  int64_t rows, row, step;
};

template <class Isa>
class SmallProduct {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;

 public:
  template <bool kAdd = false>
  static void run(LeftOperand a, const float* b, int64_t b_stride, int64_t columns, int64_t depth,
                  float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + 2 * W <= columns; c += 2 * W) {
      run_rows<4, 2, kAdd>(a, b + c, b_stride, depth, out + c, out_stride);
    }
    if (c < columns) run_rows<8, 1, kAdd>(a, b + c, b_stride, depth, out + c, out_stride);
  }

 private:
  template <int kRows, int kVectors, bool kAdd>
  static void run_rows(LeftOperand a, const float* b, int64_t b_stride, int64_t depth, float* out,
                       int64_t out_stride) {
    for (; a.rows >= kRows; a.rows -= kRows, a.data += kRows * a.row, out += kRows * out_stride) {
      tile<kRows, kVectors, kAdd>(a, b, b_stride, depth, out, out_stride);
    }
    if constexpr (kRows > 1) {
      if (a.rows > 0) {
        run_rows<kRows / 2, kVectors, kAdd>(a, b, b_stride, depth, out, out_stride);
      }
    }
  }

  template <int kRows, int kVectors, bool kAdd>
  static JAX_GLUON_INLINE void tile(LeftOperand a, const float* b, int64_t b_stride, int64_t depth,
                                    float* out, int64_t out_stride) {
    F acc[kRows][kVectors];
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = kAdd ? Isa::load(out + r * out_stride + v * W) : Isa::zero();
      }
    }
    for (int64_t d = 0; d < depth; ++d, a.data += a.step, b += b_stride) {
      F right[kVectors];
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; ++v) right[v] = Isa::load(b + v * W);
      JAX_GLUON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const F x = Isa::set1(a.data[r * a.row]);
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::fma(right[v], x, acc[r][v]);
      }
    }
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; ++v) Isa::store(out + r * out_stride + v * W, acc[r][v]);
    }
  }
};

// Extents of a problem of small heads, and how it is split into tasks.
template <class Isa>
class SmallHeads {
  static constexpr int64_t W = Isa::kLanes;
  // Products of a task, at least, so that handing it out costs little.
  static constexpr int64_t kMinWork = int64_t{1} << 17;
  // What a head costs beside its products, in products.
  static constexpr int64_t kHeadWork = 2048;

 public:
  // Queries and keys, at most.
  static constexpr int64_t kMaxTokens = 32;
  using Rules = LogitRules<Isa, kMaxTokens>;

  static bool takes(const AttentionCall& call) {
    return !call.query.quantization && !call.key.quantization && !call.value.quantization &&
           call.T <= kMaxTokens && call.S <= kMaxTokens && !call.dropout;
  }

  static KernelOffer offer() {
    return {Kernel::kSmall, "float32", {kMaxTokens, 0, 0, kMaxTokens}, {}, {}, {}};
  }

  explicit SmallHeads(const AttentionCall& call)
      : call_(call),
        group(call.N / std::max<int64_t>(call.K, 1)),
        columns(round_up(std::max<int64_t>(call.S, 1), W)),
        head_width(round_up(call.H, W)),
        value_width(round_up(call.V, W)),
        by_dots_(call.S <= kMaxDots) {}

  // Calls body(b, k, scratch) for every kv head, several in a task.
  template <class Scratch, class Prepare, class Body>
  void run(Parallel& parallel, ScratchPool<Scratch>& scratch, Prepare prepare, Body body) const {
    const int64_t heads = call_.B * call_.K;
    if (heads * group == 0) return;
    const int64_t work = group * (call_.T * call_.S * (call_.H + call_.V) + kHeadWork);
    const int64_t most = ceil_div(heads, std::max<int64_t>(4 * parallel.threads(), 1));
    const int64_t run = std::min(ceil_div(kMinWork, work), std::max<int64_t>(most, 1));
    parallel.run(ceil_div(heads, run), [&](int64_t task) {
      auto lease = scratch.acquire();
      prepare(*lease);
      const int64_t end = std::min(heads, (task + 1) * run);
      for (int64_t head = task * run; head < end; ++head) {
        body(head / call_.K, head % call_.K, *lease);
      }
    });
  }

  struct Piece {
    float** place;
    int64_t size;
  };
  // Makes room for the pieces of a scratch, zeros: what pads rows stays so.
  static void lay_out(Buffer<float>& memory, std::initializer_list<Piece> pieces) {
    int64_t total = 0;
    for (const Piece& piece : pieces) total += round_up(piece.size, W);
    memory.allocate(total + W);
    std::fill(memory.get(), memory.get() + total, 0.0f);
    float* at = memory.get();
    for (const Piece& piece : pieces) {
      *piece.place = at;
      at += round_up(piece.size, W);
    }
  }

  // Room for rows as right operand of scores(): none where their dot products are taken.
  int64_t columns_size(int64_t width) const { return by_dots_ ? 0 : width * columns; }
  // Rows [columns][width], zeros beyond the last key, as columns [width][columns].
  void to_columns(const float* rows, int64_t width, float* out) const {
    if (by_dots_) return;
    for (int64_t j = 0; j < columns; j += W) {
      for (int64_t h = 0; h < width; h += W) {
        typename Isa::F x[W];
        for (int64_t i = 0; i < W; ++i) x[i] = Isa::load(rows + (j + i) * width + h);
        transpose<Isa>(x);
        for (int64_t i = 0; i < W; ++i) Isa::store(out + (h + i) * columns + j, x[i]);
      }
    }
  }
  // scores[i][j] = left row i . right row j for all T and S; zeros in the padding. `right` are rows
  // [S][width], `right_columns` what to_columns made of them.
  void scores(const float* left, const float* right, const float* right_columns, int64_t width,
              int64_t n, float* out) const {
    if (!by_dots_) {
      SmallProduct<Isa>::run({left, call_.T, width, 1}, right_columns, columns, columns, n, out,
                             columns);
      return;
    }
    for (int64_t i = 0; i < call_.T; ++i, out += columns) {
      for (int64_t j = 0; j < call_.S; ++j) {
        // Rows are padded with zeros.
        out[j] = dot<Isa>(left + i * width, right + j * width, width);
      }
    }
  }

 private:
  // Of so few keys the columns would be padding for the most part.
  static constexpr int64_t kMaxDots = 2;
  const AttentionCall& call_;

 public:
  const int64_t group;                             // query heads of a kv head
  const int64_t columns, head_width, value_width;  // whole vectors: of scores, of rows

 private:
  const bool by_dots_;
};

}  // namespace
}  // namespace jax_gluon::cpu
