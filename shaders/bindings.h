// What the encoder binds and the kernels read: buffer slots, function constants and parameters.
// Included by Metal and by C++. Every slot that a kernel declares is bound at every dispatch; what
// a problem lacks is bound to any readable buffer.
#pragma once

#ifdef __METAL_VERSION__
typedef long Int64;
#else
#include <cstdint>
typedef int64_t Int64;
#endif

// Letters: B batch (with the axes of vmap), T query length, S key length, N query heads, K kv
// heads, H head dim, V value head dim. Query head n reads kv head n / (N / K).

// Sizes that kernels and the grids of the host agree on; block_sizes.h says what they cost.
enum BlockSize : int {
  kSimdgroups = 4,
  kThreads = 128,     // of a threadgroup
  kBlockRows = 32,    // of queries or keys that a threadgroup owns
  kTileBytes = 8192,  // of the other side, in threadgroup memory
  kChunkTokens = 32,  // that a simdgroup of quantize_extremes looks at
  kMaxQuantizedColumns = 512,
  kCenterRows = 32,   // whose medians centering takes away
  kPowersInCell = 5,  // tokens whose powers of 4 a number keeps, 3 bits each
  kLargestPower = 7,
  kMaxHeadDim = 256,
};

// How elements are stored; the order is that of plugin/attention_call.h. An operand of kU4x2 holds
// two codes biased by 8 in a byte, low nibble first; its strides count bytes.
enum ElementType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kS8 = 3, kU4x2 = 4 };

// In place of the ElementType of a tangent that is zero.
#define JAX_GLUON_NO_TANGENT (-1)

// element = code * scale + offset, where offset is 0, -zero_point * scale, or the minimum that the
// smallest code stands for.
enum OffsetKind : int { kNoOffset = 0, kZeroPoint = 1, kMinimum = 2 };

enum AttentionBuffer : int {
  kParameters = 0,    // AttentionParameters
  kBatchOffsets = 1,  // Int64 [kBatchTables][B]: where batch entry b of each operand starts. Then,
                      // where there are sinks, these: float32 [B, N]; then their tangents, where
                      // there are any, likewise. Metal has no slot after 30
  kQuery = 2,         // [B, T, N, H]
  kKey = 3,           // [B, S, K, H]
  kValue = 4,         // [B, S, K, V]
  kQueryScale = 5,    // [B, tokens / token_block, heads or 1, columns / head_block]
  kQueryOffset = 6,   // as the scale: zero points (int8) or minima
  kQueryCenter = 7,   // float32 [B, 1, N, H]
  kKeyScale = 8,
  kKeyOffset = 9,
  kKeyCenter = 10,
  kValueScale = 11,
  kValueOffset = 12,
  kValueCenter = 13,
  kBias = 14,               // float [B, N, T, S]
  kMask = 15,               // bool [B, N, T, S]
  kEntries = 16,            // BatchEntry [B]
  kVisibleKeys = 17,        // int32: the lists that entries start at
  kOut = 18,                // [B, T, N, V]: forward writes it, backward reads it
  kRowMaximum = 19,         // float32 [B, T, N]: likewise
  kLog2Sum = 20,            // float32 [B, T, N]: likewise
  kOutGradient = 21,        // [B, T, N, V]
  kLogSumExpGradient = 22,  // float32 [B, T, N]
  kRowStatistics = 23,      // RowStatistics [B, N, T]: scratch between the passes of backward,
                            // or of the bias kernel
  kQueryGradient = 24,      // [B, T, N, H]
  kKeyGradient = 25,        // [B, S, K, H]
  kValueGradient = 26,      // [B, S, K, V]
  kBiasGradient = 27,       // [L, b, n, t, s]
  kPartialOut = 28,         // float32 [B, K, parts, rows, V]: scratch of decode, where parts are
                            // kSimdgroups for each split, and rows T * N / K
  kPartialStatistics = 29,  // PartialStatistics [B, K, parts, rows]
  // Forward mode has no gradients, whose slots its tangents take.
  kOutTangent = 21,        // [B, T, N, V]
  kLogSumExpTangent = 22,  // float32 [B, T, N]: of the natural-log value
  kQueryTangent = 24,      // [B, T, N, H]
  kKeyTangent = 25,        // [B, S, K, H]
  kValueTangent = 26,      // [B, S, K, V]
  kBiasTangent = 27,       // float [B, N, T, S]
};

// Rows of the table at kBatchOffsets.
enum BatchTable : int {
  kQueryBatch = 0,
  kKeyBatch = 1,
  kValueBatch = 2,
  kQueryScaleBatch = 3,
  kQueryOffsetBatch = 4,
  kQueryCenterBatch = 5,
  kKeyScaleBatch = 6,
  kKeyOffsetBatch = 7,
  kKeyCenterBatch = 8,
  kValueScaleBatch = 9,
  kValueOffsetBatch = 10,
  kValueCenterBatch = 11,
  kBiasBatch = 12,
  kMaskBatch = 13,
  kOutBatch = 14,
  kRowMaximumBatch = 15,
  kLog2SumBatch = 16,
  kOutGradientBatch = 17,
  kLogSumExpGradientBatch = 18,
  kQueryTangentBatch = 19,
  kKeyTangentBatch = 20,
  kValueTangentBatch = 21,
  kBiasTangentBatch = 22,
  kBatchTables = 23,
};

// Function constants: all that a pipeline is specialised by, besides its name.
enum FunctionConstant : int {
  kQueryType = 0,  // ElementType
  kKeyType = 1,
  kValueType = 2,
};

// As in plugin/numerics.h: the log2_sum of a row that sees no key, and the bias below which a key
// is hidden.
#define JAX_GLUON_EMPTY_ROW_LOG2_SUM (-3.0e38f)
#define JAX_GLUON_MIN_BIAS (-2.35e38f)

struct RowStrides {
  Int64 token;
  Int64 head;
};

struct BlockStrides {
  Int64 block;   // of tokens
  Int64 head;    // 0: shared by all
  Int64 column;  // of blocks of columns
};

struct QuantizationParameters {
  BlockStrides scale;
  BlockStrides offset;
  Int64 center_head_stride;
  int token_block;  // tokens that share a scale, 0: all
  int head_block;   // elements of a row that share a scale, 0: all
  int offset_kind;  // OffsetKind
  int is_bfloat16;  // scales and minima, else float32
  int has_center;
  int has_powers;  // bfloat16 scales of a block are followed by the powers of its tokens
};

struct ScoreStrides {
  Int64 head;
  Int64 row;
  Int64 key;
};

// The first threadgroup of a dispatch in the whole grid.
struct FirstGroup {
  int x;
  int y;
  int z;
};

// What rows of a batch entry see: row i those of its `keys` from i + first to i + last, and rows at
// and past `rows` none; or what a list of kVisibleKeys says, which starts at `list` unless that is
// -1. It has a range of keys [begin, end) for each row, the range of all that eight rows see, for
// each eight of rows, and the range of rows that see any of eight keys, for each eight of keys;
// with ranks, then a range of ranks for each row and the rank of each key, which has to be in it.
struct BatchEntry {
  Int64 first;
  Int64 last;
  Int64 list;
  int rows;
  int keys;
  int has_ranks;
  // Of dropout: the generator's key, the batch index, the index of the first head, and what is
  // added to that for each head after it; the indices of the first row and the first key.
  int key0;
  int key1;
  int batch;
  int first_head;
  int head_step;
  int first_row;
  int first_key;
};

struct AttentionParameters {
  RowStrides query;
  RowStrides key;
  RowStrides value;
  RowStrides query_tangent;
  RowStrides key_tangent;
  RowStrides value_tangent;
  ScoreStrides bias_tangent;
  ScoreStrides bias;
  ScoreStrides mask;
  QuantizationParameters query_quantization;
  QuantizationParameters key_quantization;
  QuantizationParameters value_quantization;
  Int64 reach_left;  // row i sees keys from i - reach_left to i + reach_right
  Int64 reach_right;
  int B;
  int T;
  int S;
  int N;
  int K;
  int H;
  int V;
  float scale;
  float soft_cap;     // 0: none
  int is_head_major;  // out, its cotangents and all gradients are [B, N, T, ...]
  int has_bias;
  int has_mask;
  int has_entries;        // lengths, an offset, segments, positions or dropout
  int dropout_threshold;  // of 16 bits; 0: none is dropped
  float dropout_scale;    // of what is kept
  int has_sinks;
  int has_log_sum_exp_gradient;
  int bias_type;          // ElementType
  int out_type;           // of out, and of all gradients but that of the bias
  int out_gradient_type;  // of the cotangent
  int bias_gradient_type;
  int bias_batches;      // b: 1 where the gradient of the bias is summed over the batch, else that
  int bias_heads;        // n: 1 or N
  int bias_rows;         // t: 1 or T
  int bias_keys;         // s: 1 or S
  int batch_per_map;     // B / L, where L is the product of the axes of vmap
  int finds_statistics;  // the bias kernel: it writes statistics of rows, and no gradient
  int query_tangent_type;  // ElementType, or JAX_GLUON_NO_TANGENT
  int key_tangent_type;
  int value_tangent_type;
  int bias_tangent_type;
  int has_sinks_tangent;
  int out_tangent_type;  // ElementType
  int splits;            // decode: parts of the keys
  int split_keys;        // keys in each
  FirstGroup first_group;
};

// Of a query row, from the dQ pass to the dK/dV pass, or from the bias kernel's first run to its
// second. Logits are in base 2.
struct RowStatistics {
  float maximum;
  float log2_sum;
  float delta;   // dS = P * (dP - delta)
  float center;  // added to every logit before bias and soft cap
};

// Of a query row over one part of the keys.
struct PartialStatistics {
  float maximum;
  float sum;
};

enum QuantizeBuffer : int {
  kQuantizeParameters = 0,    // QuantizeParameters
  kQuantizeBatchOffsets = 1,  // Int64 [2][B]: of x, of visible
  kQuantizeInput = 2,         // float [B, S, K, H]
  kQuantizeVisible = 3,       // bool [B, S]
  kQuantizeData = 4,          // int8 [B, S, K, H] or uint8 [B, S, K, H / 2]
  kQuantizeScale = 5,         // [B, S', K', H']
  kQuantizeOffset = 6,        // as the scale
  kQuantizeCenter = 7,        // float32 [B, 1, K, H]
  kQuantizeExtremes = 8,  // float32 [B, K, chunks, 2, H]: scratch where all tokens share scales;
                          // with powers, [B, K]: squared norms of ordinary tokens
};

struct QuantizeParameters {
  RowStrides x;
  int B;
  int S;
  int K;
  int H;
  int batch_per_map;  // B / L: a tensor's scale is shared by as many batch entries
  int x_type;         // ElementType
  int bits;
  int is_symmetric;
  int has_minimum;  // the offset is a minimum, else a zero point
  int token_block;
  int head_block;
  int is_per_tensor;
  int has_center;
  int has_visible;
  int is_rotated;
  int is_bfloat16;  // scales and minima, else float32
  int chunks;       // of tokens, for extremes
  int has_powers;   // large tokens are divided by powers of 4
};
