// Flash attention backward in one pass of five products. For each block of queries: recompute S and
// dP = dO V^T for all keys that it sees and keep P and dP; then D = rowsum(P dP) is known, and
// dS = P (dP - D), dV += P^T dO, dK += dS^T Q, dQ = dS K. An output that was rounded has no part in
// D, so rows of dS sum to 0; of an exact one, and more keys than a tile has, D = rowsum(dO O), and
// P and dP are kept for one tile of keys only.
#pragma once

#include <algorithm>

#include "cpu/backward/backward_blocks.h"
#include "cpu/backward/backward_rows.h"
#include "cpu/backward/backward_tasks.h"
#include "cpu/backward/backward_tiles.h"
#include "cpu/memory/buffer.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, Kernel kKernel>
class AttentionBackward {
  using Blocks = BackwardBlocks<Isa, kKernel>;
  using Block = BackwardBlock<Isa>;
  using Part = BackwardPart;
  using Tiles = BackwardTiles<Isa, kKernel>;
  using Scratch = typename Tiles::Scratch;
  static constexpr int64_t W = Isa::kLanes;

 public:
  AttentionBackward(const AttentionBackwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        rows_(call),
        blocks_(call, rows_.output_is_exact()),
        tasks_(call, parallel, blocks_),
        mask_tiles_(call),
        tiles_(call, rows_, blocks_, mask_tiles_),
        scratch_(parallel.threads()) {}

  static KernelOffer offer(const AttentionBackwardCall& call) { return Blocks::offer(call); }
  void describe(KernelRun& run) const { blocks_.describe(run); }

  void run() {
    if (call_.B * call_.N == 0) return;
    rows_.find_centers(parallel_);
    mask_tiles_.find(parallel_);
    tasks_.run([this](Part& part, Range rows) { differentiate(part, rows); });
  }

 private:
  void differentiate(Part& part, Range rows) {
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    tiles_.prepare(s);
    s.needs_row_sum = rows_.key_center(part.b, part.k) && rows_.key_center_matters();
    const int64_t group = call_.N / call_.K, end = (part.k + 1) * group;
    for (int64_t n = part.k * group; n < end; n += blocks_.block_heads) {
      const int64_t heads = std::min(blocks_.block_heads, end - n);
      for (int64_t i = rows.begin; i < rows.end; i += blocks_.block_rows) {
        row_block({n, heads, {i, std::min(i + blocks_.block_rows, rows.end)}}, part, s);
      }
    }
  }

  void row_block(const Block& block, Part& part, Scratch& s) const {
    const int64_t count = block.count(), padded = round_up(count, F32Core<Isa>::kGroupRows);
    float* dq = s.d_query.get();
    std::fill(dq, dq + padded * blocks_.head_columns, 0.0f);
    const Range keys = part.visibility.of_rows(block.queries);
    if (!keys.empty()) {
      tiles_.load_queries(part.b, block, s);
      tiles_.load_keys_to(keys.end, part, s);
      std::fill(s.weighted.get(), s.weighted.get() + padded * W, 0.0f);
      std::fill(s.total.get(), s.total.get() + padded * W, 0.0f);
      std::fill(s.row_sum.get(), s.row_sum.get() + padded, 0.0f);
      const int64_t first = (keys.begin - part.first_key) / blocks_.tile_keys;
      const int64_t last = ceil_div(keys.end - part.first_key, blocks_.tile_keys);
      for (int64_t t = first; blocks_.reads_output && t < last; ++t) {
        tiles_.find_probabilities(block, part, t, 0, s);
        tiles_.add_gradients(count, part, t, 0, s);
      }
      if (!blocks_.reads_output) whole_rows(block, part, {first, last}, s);
      add_key_center(part.b, part.k, count, dq, s);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = call_.d_query.at(part.b, block.query_of(r), block.head_of(r));
      store_row<Isa>(call_.d_query, at, dq + r * blocks_.head_columns, call_.H, call_.scale);
    }
  }

  // The gradients of tiles of keys, after D of the rows is found from all of them.
  void whole_rows(const Block& block, const Part& part, Range tiles, Scratch& s) const {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      tiles_.find_probabilities(block, part, t, t - tiles.begin, s);
    }
    for (int64_t r = 0; r < block.count(); ++r) {
      s.statistics[r].take_sums(Isa::reduce_add(Isa::load(s.weighted.get() + r * W)),
                                Isa::reduce_add(Isa::load(s.total.get() + r * W)));
    }
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      tiles_.add_gradients(block.count(), part, t, t - tiles.begin, s);
    }
  }

  // dQ = dS (K + center): the center's part is rowsum(dS) * center.
  void add_key_center(int64_t b, int64_t k, int64_t rows, float* dq, Scratch& s) const {
    if (!s.needs_row_sum) return;
    const float* center = rows_.key_center(b, k);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < call_.H; ++h)
        dq[r * blocks_.head_columns + h] += s.row_sum[r] * center[h];
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  BackwardRows<Isa, AttentionBackwardCall> rows_;
  const Blocks blocks_;
  BackwardTasks<Isa, Blocks> tasks_;
  MaskTiles mask_tiles_;
  const Tiles tiles_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
