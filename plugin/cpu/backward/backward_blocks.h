// How a backward pass is divided: parts of rows into blocks, and what they see into blocks of keys,
// and tiles whose P and dP are kept.
#pragma once

#include <algorithm>
#include <numeric>

#include "cpu/backward/backward_parts.h"
#include "cpu/tiles/cores.h"
#include "device.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

// In the gluon pipeline blocks of keys are packed ahead of their use, and P is made of one register
// tile of products, before they leave the registers: the products of the next one do not wait for
// it.
template <class Isa, Kernel kKernel>
class BackwardBlocks {
  using Core = F32Core<Isa>;
  static constexpr int64_t kGroupRows = Core::kGroupRows;
  static constexpr int64_t kMinRows = 24;
  // Elements of P of a block, at most, unless that makes it too low: they are read back once.
  static constexpr int64_t kMaxScores = int64_t{1} << 20;

 public:
  // Columns of a tile come in whole score panels, and in whole tiles of dK and dV.
  static constexpr int64_t kColumnStep = std::lcm(Core::kTileRows, Core::kTileColumns);
  static constexpr bool kGluon = kKernel == Kernel::kGluon;
  // Rows in a block, at most: what packed keys, dK and dV are read for.
  static constexpr int64_t kMaxRows = 96;
  // P and dP of a block are rows of at most this many keys, then of the next ones.
  static constexpr int64_t kMaxTileKeys = 192;
  static_assert(kMaxRows % kGroupRows == 0 && kMaxTileKeys % kColumnStep == 0);

  BackwardBlocks(const AttentionBackwardCall& call, bool output_is_exact)
      : call_(call),
        parts(call),
        head_columns(round_up(call.H, Core::kTileColumns)),
        value_columns(round_up(call.V, Core::kTileColumns)),
        tile_keys(std::min({kMaxTileKeys, round_up(subtile_of(call.cpu_kernel), kColumnStep),
                            round_up(std::max<int64_t>(call.S, 1), kColumnStep)})),
        reads_output((output_is_exact || call.is_partial) && call.S > tile_keys),
        block_keys(round_up(call.cpu_kernel.block_k, tile_keys)),
        stages(std::max<int64_t>(call.cpu_kernel.stages, 1)) {
    const int64_t rows = std::max<int64_t>(call.T, 1), group = call.N / call.K;
    const int64_t kept = reads_output ? tile_keys : parts.max_keys(kMaxRows);
    const int64_t fit = kMaxScores / std::max<int64_t>(kept, 1);
    const int64_t max_rows =
        std::min(std::max(fit / kGroupRows * kGroupRows, round_up(kMinRows, kGroupRows)), kMaxRows);
    block_heads = std::max<int64_t>(std::min(max_rows / rows, group), 1);
    block_rows = std::min(max_rows, round_up(block_heads * rows, kGroupRows));
    parts.set_block_rows(block_rows);
    const BackwardParts::Seen seen = parts.max_seen();
    // Keys are counted from the first of a register tile.
    part_keys = round_up(seen.by_part, tile_keys) + tile_keys;
    block_tiles = reads_output ? 1 : ceil_div(seen.by_block, tile_keys) + 1;
  }

  // A larger block is for long rows, which every block of queries reads again.
  static KernelOffer offer(const AttentionBackwardCall& call) {
    const SizeRange tile = {kMaxTileKeys, kMaxTileKeys / 2, kMaxTileKeys, kMaxTileKeys / 2};
    if (!kGluon) return {kKernel, "float32", {}, tile, {}, {}};
    const bool is_long = call.H > 64 && max_visible_keys(call) >= 2048;
    const SizeRange block_k = {is_long ? 4 * kMaxTileKeys : kMaxTileKeys, kMaxTileKeys,
                               kMaxBlockKeys, kMaxTileKeys / 2};
    SizeRange subtile = tile;
    if (!is_long) subtile.preferred = tile.min;
    return {kKernel, "float32", {}, block_k, subtile, {2, 2, kMaxStages, 1}};
  }

  void describe(KernelRun& run) const {
    run.block_k = kGluon ? block_keys
                         : std::min(kMaxTileKeys, round_up(call_.cpu_kernel.block_k, kColumnStep));
    run.subtile =
        kGluon ? std::min(kMaxTileKeys, round_up(call_.cpu_kernel.subtile, kColumnStep)) : 0;
    run.stages = kGluon ? stages : 0;
  }

  // Where the packed keys, dK and dV of rows that see `keys` start.
  static int64_t first_key(Range keys) {
    return keys.begin / Core::kTileColumns * Core::kTileColumns;
  }

 private:
  // Keys whose P and dP are kept at a time: in the baseline pipeline those of a block.
  static int64_t subtile_of(const KernelChoice& kernel) {
    return kGluon ? kernel.subtile : kernel.block_k;
  }

  const AttentionBackwardCall& call_;

 public:
  BackwardParts parts;
  const int64_t head_columns, value_columns;  // in whole panels
  const int64_t tile_keys;
  // Whether D is found from dO and O, or known; else from P and dP of whole rows, which are kept.
  const bool reads_output;
  const int64_t block_keys;
  const int64_t stages;                     // blocks of keys that are packed ahead, and in use
  int64_t block_heads = 1;                  // query heads whose few rows share a block
  int64_t block_rows = 0, block_tiles = 0;  // rows of a block, and its tiles that are kept
  int64_t part_keys = 0;                    // that a part sees, at most
};

// Rows that are computed together: of several query heads of a kv head where each has few.
template <class Isa>
struct BackwardBlock {
  int64_t n, heads;
  Range queries;
  int64_t count() const { return heads * height(); }
  int64_t height() const { return queries.end - queries.begin; }
  int64_t head_of(int64_t r) const { return heads == 1 ? n : n + r / height(); }
  int64_t query_of(int64_t r) const { return queries.begin + (heads == 1 ? r : r % height()); }
  // The queries among the group of rows from g on.
  Range queries_of(int64_t g) const {
    if (heads > 1) return queries;
    return {queries.begin + g, std::min(queries.begin + g + F32Core<Isa>::kGroupRows, queries.end)};
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
