// The one description of an attention problem that travels from the XLA FFI handlers to a Device.
//
// Letters, everywhere: B batch, T query length, S key length, N query heads, K kv heads, H head
// dim, V value head dim. Query head n reads kv head n / (N / K).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "block_mask.h"
#include "visible_keys.h"

namespace jax_gluon {

// kU4x2: a byte holds two 4-bit codes biased by 8, low nibble first; extents and strides of such an
// operand count bytes.
enum class DType : uint8_t { kF32, kBF16, kF16, kS8, kU4x2 };

constexpr size_t size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kS8 || dtype == DType::kU4x2 ? 1 : 2;
}

// A read-only operand of logical shape [batch, d1, d2, d3], every stride in elements, 0 on a
// broadcast axis. `batch_offset[b]` is where flat batch index b starts: leading axes that vmap adds
// fold into the batch, and an operand that was not mapped has repeated offsets.
//
// Tokens (d1) may be in pages, whose tokens alone are `stride[0]` apart: `batch_offset` then has
// where each of an entry's `pages` starts, and of blocks of tokens a page holds whole ones.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  std::vector<int64_t> batch_offset;
  int64_t stride[3] = {0, 0, 0};
  int64_t pages = 0;   // of an entry, 0: tokens are in one piece
  int page_shift = 0;  // a page has 2^page_shift tokens

  explicit operator bool() const { return data != nullptr; }
};

// Optional: a number for each token of entry b, at data[batch_offset[b] + token].
struct TokenIntegers {
  const int32_t* data = nullptr;
  std::vector<int64_t> batch_offset;

  explicit operator bool() const { return data != nullptr; }
};

// A probability is dropped where 16 random bits are below `threshold`; else it is multiplied by
// `scale`. 0: none is. Of entry b, `seeds` has the generator's key (two numbers), its batch index,
// the index of its first head, and what is added to that for each head after it; and the indices of
// its first row and its first key.
struct Dropout {
  uint32_t threshold = 0;
  float scale = 1.0f;
  TokenIntegers seeds;

  explicit operator bool() const { return threshold != 0; }
};

// An output [batch, d1, d2, d3], never broadcast: dense, row-major, or with d2 before d1.
struct Result {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride[3] = {0, 0, 0};  // of batch, d1 and d2, in elements

  // The element at which a row of d3 starts.
  int64_t at(int64_t b, int64_t i, int64_t n) const {
    return b * stride[0] + i * stride[1] + n * stride[2];
  }

  explicit operator bool() const { return data != nullptr; }
};

// What integer codes stand for: element = code * scale + offset, where offset is 0, -zero_point *
// scale, or the minimum that the least code stands for. `center` is added to the element.
struct Quantization {
  enum class Offset : uint8_t { kNone, kZeroPoint, kMinimum };

  int64_t bits = 0;         // 8, 4, or 0: not quantized
  int64_t token_block = 0;  // tokens that share a scale, 0: all
  int64_t head_block = 0;   // elements of a row that share a scale, 0: all
  Offset offset_kind = Offset::kNone;
  bool has_powers = false;  // see kPowersInCell
  Operand
      scale;  // [B, tokens / token_block, heads or 1, columns / head_block], float32 or bfloat16
  Operand offset;  // as scale, without the powers; zero points are int8
  Operand center;  // optional, float32, [B, 1, heads, columns]

  explicit operator bool() const { return bits != 0; }
};

// One group a row is one scale a row.
constexpr int64_t whole_head_block(int64_t head_block, int64_t width) {
  return head_block >= width && width > 1 ? 0 : head_block;
}

// Rows of floats or of codes.
struct QuantizableOperand : Operand {
  Quantization quantization;
};

// The kernels of a pass; results agree up to rounding. kernels.h says which a device has for a
// call.
// - baseline: a block of keys is loaded, then computed on, its softmax in one piece.
// - gluon: blocks are filled ahead of their use, and the softmax is taken a subtile at a time.
// - decode: few queries; the keys are split, and partial results merged.
// - small: heads of few keys, all of them in one piece.
enum class Kernel : uint8_t { kBaseline, kGluon, kDecode, kSmall };

// A kernel and the sizes of its blocks, in keys: of those that are loaded at a time, of those that
// share a step of the softmax; and how many blocks are kept. 0: the kernel has no such size. The
// CPU rounds them to whole tiles, and to the most that it has room for.
struct KernelChoice {
  Kernel kernel = Kernel::kBaseline;
  int64_t block_k = 0, subtile = 0, stages = 0;

  bool operator==(const KernelChoice& other) const {
    return kernel == other.kernel && block_k == other.block_k && subtile == other.subtile &&
           stages == other.stages;
  }
};

struct AttentionCall {
  // One for each device, since a call may leave open where it runs. Block sizes are compiled into
  // Metal's kernels.
  KernelChoice cpu_kernel;
  Kernel metal_kernel = Kernel::kBaseline;

  // Whether float rows, and the numbers for each row, lie head by head: [B, N, T, H]. Strides of
  // operands and results say so too.
  bool head_major = false;

  // Extents; B is the product of every leading (vmap) axis and the batch axis. Any may be 0.
  int64_t B = 0, T = 0, S = 0, N = 0, K = 0, H = 0, V = 0;

  // logits = soft_cap(scale * q k^T + bias); soft_cap(x) = c tanh(x / c), 0 means none.
  float scale = 1.0f;
  float soft_cap = 0.0f;
  // Key j is visible to query i where j <= i (top-left alignment, T and S may differ).
  bool causal = false;
  // Key j is visible to query i where i - window_left <= j <= i + window_right; -1: no limit.
  int64_t window_left = -1, window_right = -1;

  QuantizableOperand query;  // [B, T, N, H], strides T, N, H
  QuantizableOperand key;    // [B, S, K, H], strides S, K, H
  QuantizableOperand value;  // [B, S, K, V], strides S, K, V

  Operand bias;                            // optional, float, [B, N, T, S], strides N, T, S
  const uint8_t* mask = nullptr;           // optional, 1: visible, [B, N, T, S]
  std::vector<int64_t> mask_batch_offset;  // as Operand::batch_offset
  int64_t mask_stride[3] = {0, 0, 0};      // strides N, T, S
  BlockMask block_mask;
  // Optional; entry b at seq_lengths[offset[b]]. Values outside [0, T] or [0, S] are clamped.
  const int32_t* query_seq_lengths = nullptr;
  std::vector<int64_t> query_seq_lengths_offset;
  const int32_t* key_value_seq_lengths = nullptr;
  std::vector<int64_t> key_value_seq_lengths_offset;
  // Optional; row i of entry b stands at position i + query_offset[query_offset_offset[b]], in
  // which causal and window are meant. Any value is legal.
  const int32_t* query_offset = nullptr;
  std::vector<int64_t> query_offset_offset;
  // Optional, float32, [B, N], stride N: a logit of each query head that is in the denominator of
  // the softmax alone.
  Operand sinks;
  // Both or neither: a row sees keys of its segment. [B, T] and [B, S], of any value.
  TokenIntegers query_segment_ids, key_value_segment_ids;
  // Both or neither, in place of indices: what causal and window are meant in.
  TokenIntegers query_positions, key_value_positions;
  Dropout dropout;
  // Of keys and values in pages; 0: they are in one piece. S is then a multiple of it.
  int64_t page_tokens = 0;
  // What all of these let rows see, where there are segments or positions: what kernels read.
  std::vector<std::shared_ptr<const VisibleKeys>> visible_keys;

  bool has_mask() const { return mask || block_mask; }
};

// Past any sequence and any int32 offset, and small enough for sums.
constexpr int64_t kFar = int64_t{1} << 60;

// How many keys before and after its own position a row sees: kFar where nothing limits it.
struct Reach {
  int64_t left, right;
};

inline Reach reach_of(const AttentionCall& call) {
  const int64_t left = call.window_left < 0 ? kFar : call.window_left;
  const int64_t right = call.causal ? 0 : call.window_right < 0 ? kFar : call.window_right;
  return {left < kFar ? left : kFar, right < kFar ? right : kFar};
}

// The center of a head and channel is the lower median of the finite values among this many of the
// first tokens that can be seen; 0 where there are none, and where it is so large that a difference
// from it might not be finite. It depends on no later token, and an outlier does not move it.
constexpr int64_t kCenterTokens = 32;
constexpr float kLargestCenter = 0x1p100f;

// With has_powers a token that is large beside an ordinary one is divided by a power of 4, so that
// it does not widen the scales that it shares: element = (code * scale + offset) * 4^power +
// center. An ordinary token has the lower median of the squared norms, without the center, of the
// tokens that the center is taken from; where that is smaller than kMinOrdinaryNorm, squares of
// elements might not be normal, and all powers are 0. Scales of a block, bfloat16, are followed by
// the powers of its tokens, 3 bits each, five in a number. Two bits of its exponent are never
// alike, so that it is neither NaN nor subnormal, and passes through XLA as it is.
constexpr int64_t kPowersInCell = 5;
constexpr int kLargestPower = 7;
constexpr float kMinOrdinaryNorm = 0x1p-100f;

// Numbers that keep the powers of a block of tokens.
constexpr int64_t power_cells(int64_t token_block) {
  return (token_block + kPowersInCell - 1) / kPowersInCell;
}

// Codes of float rows; a block of elements that share a scale may span rows and heads.
struct QuantizeCall {
  // B = L * batch: an entry of the L vmap axes is quantized by itself.
  int64_t L = 1, B = 0, S = 0, K = 0, H = 0;
  Operand x;  // [B, S, K, H], float

  int64_t bits = 8;
  bool symmetric = true;
  bool float_minimum = false;  // offset is the least element instead of a zero point
  int64_t token_block = 1, head_block = 0;
  bool per_tensor = false;   // one scale for everything but L
  bool rotate = false;       // by the randomised Hadamard matrix along H, before all else
  bool is_centered = false;  // subtract the center of each head and channel: see kCenterTokens
  bool has_powers = false;   // divide large tokens by powers of 4: see kPowersInCell
  // Optional: 1 where token i of entry b can be seen, at visible[visible_offset[b] + i]. A token
  // that can't be is in no extreme and no center, and is read as zeros.
  const uint8_t* visible = nullptr;
  std::vector<int64_t> visible_offset;

  Result data;    // [B, S, K, H], int8, or [B, S, K, H / 2], kU4x2
  Result scale;   // [B, S', K', H'], float32 or bfloat16
  Result offset;  // as scale, without powers, zero points int8; only if not symmetric
  Result center;  // [B, 1, K, H], float32; only if is_centered
  // Of codes that a forward call makes: which of the L entries each entry of the vmap axes has,
  // since what was not mapped is made once. Results have room for all; the device makes the first
  // L.
  std::vector<int64_t> map_made;
};

struct AttentionForwardCall : AttentionCall {
  // What runs first: the quantizer, whose results are operands of this call.
  std::vector<QuantizeCall> quantize;
  Result out;                    // [B, T, N, V], float
  Result row_maximum, log2_sum;  // [B, T, N], float32, sinks included: see kEmptyRowLog2Sum
};

// The forward pass and its derivative along tangents of the operands, of what codes stand for. A
// tangent that is not there is zero.
struct AttentionTangentCall : AttentionForwardCall {
  Operand query_tangent, key_tangent, value_tangent;  // as query, key and value, but float
  Operand bias_tangent, sinks_tangent;                // as bias and sinks
  Result tangent_out;                                 // [B, T, N, V], float
  Result tangent_log_sum_exp;  // [B, T, N], float32: of the natural-log value
};

struct AttentionBackwardCall : AttentionCall {
  Operand out;                    // [B, T, N, V], strides T, N, V
  Operand row_maximum, log2_sum;  // [B, T, N], strides T, N: as the forward call wrote them
  Operand d_out;                  // [B, T, N, V]
  Operand d_log_sum_exp;  // optional, float32, [B, T, N]: cotangent of the natural-log value
  // Whether the keys are a part of those that rows see: log-sum-exp and output are those of all,
  // and D, the rows' mean of dP, has been taken from `d_log_sum_exp`, since no part knows it.
  bool is_partial = false;

  Result d_query;  // [B, T, N, H], float
  Result d_key;    // [B, S, K, H], float
  Result d_value;  // [B, S, K, V], float
};

// The gradient of the bias alone: a call of its own, so that XLA drops it when nobody asks.
struct AttentionBackwardBiasCall : AttentionCall {
  Operand out, row_maximum, log2_sum, d_out, d_log_sum_exp;  // as in AttentionBackwardCall
  bool is_partial = false;
  // Shape [L, b, n, t, s], float: L is the product of the vmap axes, b is 1 or the real batch, n is
  // 1 or N, t is 1 or T, s is 1 or S; an axis of extent 1 is summed over.
  Result d_bias;
  int64_t L = 1;  // B == L * real batch
  int64_t b = 1, n = 1, t = 1, s = 1;
};

}  // namespace jax_gluon
