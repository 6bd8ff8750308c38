// The blocks that a forward pass works in.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/memory/buffer.h"
#include "cpu/tiles/cores.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// Keys per block, at most, of the baseline pipeline: the scores of a row group (12 x 256 x 4 bytes)
// stay in L1, and a block of K and V (64 KiB each at H = 64 float32) in L2 while every row group of
// a query block reads it.
constexpr int kBlockKeys = 256;
// Query rows per task: a multiple of every row group; what K and V are read from L2 for.
constexpr int kBlockRows = 96;
// Keys that share one maximum where probabilities have 8 bits: 64 is the knee between the error of
// a coarser maximum and the cost of rescaling.
constexpr int kSubtileKeys = 64;

// Probabilities of 8 bits are integers up to this, which their subtile's largest gets.
constexpr float kMaxProbability = 255.0f, kLog2OfMaxProbability = 7.99435344f;
// The maximum of such a subtile with nothing visible: finite, since -inf - -inf would be NaN.
constexpr float kEmptySubtileMaximum = -1e30f;

// Bytes of a probability, and the type of one.
template <class Core>
constexpr int kProbabilityBytes = sizeof(typename Core::Lane) / Core::kGroup;
template <class Core>
using ProbabilityElement =
    std::conditional_t<kProbabilityBytes<Core> == 4, float,
                       std::conditional_t<kProbabilityBytes<Core> == 2, uint16_t, uint8_t>>;

template <class Core>
struct ForwardBlocks {
  static constexpr int C = Core::kTileColumns;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;
  static constexpr bool kBf16 = Core::kArithmetic == Arithmetic::kBf16;
  // Of the polynomial in exp2 of probabilities, which 8 or 16 bits round anyway.
  static constexpr int kExp2Degree = kInt8 || kBf16 ? 3 : 5;
  // Keys of a subtile of the gluon pipeline, at most: a row's logits are kept in registers, with
  // AVX-512 and NEON half of all.
  static constexpr int kSubtileColumns =
      kInt8 ? kSubtileKeys : Core::Isa::kSubtileVectors * Core::Isa::kLanes;
  // Key ranges are rounded to this many keys.
  static constexpr int kStep = kInt8 ? (kSubtileKeys > C ? kSubtileKeys : C) : C;
  static_assert(kBlockKeys % kStep == 0 && kStep % C == 0 && kBlockRows % Core::kGroupRows == 0);

  static KernelOffer baseline_offer() {
    return {Kernel::kBaseline,
            name_of(Core::kArithmetic),
            {},
            {kBlockKeys, 64, kBlockKeys, 64},
            {},
            {}};
  }
  static KernelOffer gluon_offer() {
    constexpr int64_t kMin = kInt8 ? kSubtileColumns : kSubtileColumns / 2;
    static_assert(kMin % C == 0);
    const SizeRange block_k = {512, 2 * kMin, kMaxBlockKeys, kMin};
    const SizeRange subtile =
        kInt8 ? SizeRange() : SizeRange{kSubtileColumns, kMin, kSubtileColumns, kMin};
    return {Kernel::kGluon, name_of(Core::kArithmetic), {}, block_k,
            subtile,        {2, 2, kMaxStages, 1}};
  }

  // The baseline pipeline's keys in a block.
  static int64_t block_keys(const AttentionForwardCall& call) {
    return std::min<int64_t>(kBlockKeys, round_up(call.cpu_kernel.block_k, kStep));
  }
  // The gluon pipeline's keys in a subtile, and in a block of its ring: whole subtiles.
  static int64_t subtile_keys(const AttentionForwardCall& call) {
    return kInt8 ? kSubtileColumns
                 : std::min<int64_t>(kSubtileColumns, round_up(call.cpu_kernel.subtile, C));
  }
  static int64_t ring_keys(const AttentionForwardCall& call) {
    return round_up(call.cpu_kernel.block_k, std::max<int64_t>(kStep, subtile_keys(call)));
  }

  // Whether the core computes the call: INT8 where all operands are codes whose scales don't vary
  // along a row (4-bit rows are rounded to INT8 rows otherwise), float32 takes everything.
  static bool takes(const AttentionCall& call) {
    const QuantizableOperand* operands[] = {&call.query, &call.key, &call.value};
    for (const QuantizableOperand* x : operands) {
      const Quantization& q = x->quantization;
      if (kInt8 && (!q || (q.bits == 8 && q.head_block != 0))) return false;
      if (kBf16 && (q || x->dtype != DType::kBF16)) return false;
    }
    // Centers and offsets of values are added for all keys, dropped ones too.
    const Quantization& value = call.value.quantization;
    if (kInt8 && call.dropout && value.head_block == 0 && (value.center || value.offset)) {
      return false;
    }
    return !kInt8 || !call.query.quantization.center;
  }
};

// Rows of operands on their way to lanes: of one task.
template <class Core>
struct RowScratch {
  using Lane = typename Core::Lane;

  void prepare(const AttentionForwardCall& call) {
    constexpr int R = Core::kTileRows, C = Core::kTileColumns;
    constexpr int64_t W = Core::Isa::kLanes;
    rows.allocate(std::max(C, R) * row_lanes<Core>(call.H));
    row.allocate(std::max(call.H, round_up(call.V, C)) + W);
    code_stride = round_up(std::max(call.H, call.V), kAlignment);
    if (ForwardBlocks<Core>::kInt8) codes.allocate(kSubtileKeys * code_stride + 4 * W);
  }

  Buffer<Lane> rows;     // rows as lanes
  Buffer<float> row;     // a float row
  Buffer<int8_t> codes;  // INT8: rows of codes of a subtile
  int64_t code_stride = 0;
};

}  // namespace
}  // namespace jax_gluon::cpu
