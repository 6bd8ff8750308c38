#include "metal/attention_encoder.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>

#include "metal/metal.h"
#include "metal/parameters.h"
#include "numerics.h"

namespace jax_gluon::metal {
namespace {

constexpr int kSlots = kPartialStatistics + 1;
static_assert(kMaxHeadDim == kMaxHeadDimOfMetal &&
              kMaxQuantizedColumns == kMaxQuantizedHeadDimOfMetal);

// Elements from the first of an operand to past its last.
int64_t extent_of(const Operand& x, const std::vector<int64_t>& offsets,
                  const std::vector<int64_t>& extents) {
  int64_t last = *std::max_element(offsets.begin(), offsets.end());
  for (int d = 0; d < 3; ++d) last += (extents[d] - 1) * x.stride[d];
  return last + 1;
}

// The list of a batch entry: see BatchEntry of bindings.h.
void append_list(const VisibleKeys& visible, int64_t S, std::vector<int32_t>& lists) {
  const auto append = [&](int32_t begin, int32_t end) {
    lists.push_back(begin);
    lists.push_back(end);
  };
  const size_t T = visible.begin.size(), eights = static_cast<size_t>(S + 7) / 8;
  for (size_t i = 0; i < T; ++i) append(visible.begin[i], visible.end[i]);
  for (size_t i = 0; i < T; i += 8) {
    int32_t begin = std::numeric_limits<int32_t>::max(), end = 0;
    for (size_t r = i; r < std::min(i + 8, T); ++r) {
      if (visible.begin[r] >= visible.end[r]) continue;
      begin = std::min(begin, visible.begin[r]);
      end = std::max(end, visible.end[r]);
    }
    append(std::min(begin, end), end);
  }
  // The first and the last row that see any of eight keys. Each is found once: `next` leads past
  // those that are.
  std::vector<int32_t> first(eights, 0), last(eights, -1);
  const auto paint = [&](std::vector<int32_t>& rows, size_t row, std::vector<size_t>& next) {
    if (visible.begin[row] >= visible.end[row]) return;
    const size_t end = (static_cast<size_t>(visible.end[row]) + 7) / 8;
    size_t g = static_cast<size_t>(visible.begin[row]) / 8;
    while (g < end) {
      size_t free = g;
      while (next[free] != free) free = next[free] = next[next[free]];
      if (free >= end) break;
      rows[free] = static_cast<int32_t>(row);
      next[free] = free + 1;
      g = free + 1;
    }
  };
  for (std::vector<int32_t>* rows : {&first, &last}) {
    std::vector<size_t> next(eights + 1);
    std::iota(next.begin(), next.end(), size_t{0});
    for (size_t i = 0; i < T; ++i) paint(*rows, rows == &first ? i : T - 1 - i, next);
  }
  for (size_t g = 0; g < eights; ++g) append(first[g], last[g] + 1);
  if (!visible.has_ranks()) return;
  for (size_t i = 0; i < T; ++i) append(visible.first_rank[i], visible.last_rank[i]);
  lists.insert(lists.end(), visible.ranks.begin(), visible.ranks.end());
}

}  // namespace

// --- What all kernels share ---

AttentionEncoder::AttentionEncoder(Context& context, Buffers& buffers, const AttentionCall& call)
    : context_(context), call_(call), bindings_(context, buffers, kSlots) {
  const int64_t widest = std::max(call.H, call.V);
  if (widest > kMaxHeadDim) {
    throw Error("the head dim is " + std::to_string(widest) + "; the Metal kernels take at most " +
                std::to_string(kMaxHeadDim) + ": use implementation=\"cpu\"");
  }
  head_dim_ = widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
  AttentionParameters& p = parameters_;
  p.B = narrow(call.B, "the batch");
  p.T = narrow(call.T, "the query length");
  p.S = narrow(call.S, "the key length");
  p.N = narrow(call.N, "the number of query heads");
  p.K = narrow(call.K, "the number of key heads");
  p.H = static_cast<int>(call.H);
  p.V = static_cast<int>(call.V);
  p.scale = call.scale;
  p.soft_cap = call.soft_cap;
  p.is_head_major = call.head_major;
  p.reach_left = reach_of(call).left;
  p.reach_right = reach_of(call).right;
  p.batch_per_map = p.B;
  tables_.resize(kBatchTables * static_cast<size_t>(call.B));

  bind_rows(kQuery, kQueryBatch, call.query, call.T, call.N, call.H, &p.query,
            &p.query_quantization);
  bind_rows(kKey, kKeyBatch, call.key, call.S, call.K, call.H, &p.key, &p.key_quantization);
  bind_rows(kValue, kValueBatch, call.value, call.S, call.K, call.V, &p.value,
            &p.value_quantization);
  if (call.bias) {
    bind_operand(kBias, kBiasBatch, call.bias, {call.N, call.T, call.S});
    p.bias = {call.bias.stride[0], call.bias.stride[1], call.bias.stride[2]};
    p.bias_type = element_type(call.bias.dtype);
    p.has_bias = 1;
  }
  if (call.mask) {
    Operand mask;
    mask.data = call.mask;
    mask.dtype = DType::kS8;  // bytes
    mask.batch_offset = call.mask_batch_offset;
    std::copy(call.mask_stride, call.mask_stride + 3, mask.stride);
    bind_operand(kMask, kMaskBatch, mask, {call.N, call.T, call.S});
    p.mask = {mask.stride[0], mask.stride[1], mask.stride[2]};
    p.has_mask = 1;
  }
  p.has_entries = call.query_seq_lengths || call.key_value_seq_lengths || call.query_offset ||
                  !call.visible_keys.empty() || call.dropout;
  p.dropout_threshold = static_cast<int>(call.dropout.threshold);
  p.dropout_scale = call.dropout.scale;
  if (p.has_entries) bind_entries();
  p.has_sinks = static_cast<bool>(call.sinks);
  if (call.sinks) add_heads(call.sinks);
}

void AttentionEncoder::bind_entries() {
  const AttentionCall& call = call_;
  const auto number = [](const int32_t* x, const std::vector<int64_t>& offset, int64_t b) {
    return int64_t{x[offset[static_cast<size_t>(b)]]};
  };
  std::vector<BatchEntry> entries(static_cast<size_t>(call.B));
  std::map<const VisibleKeys*, Int64> starts;
  std::vector<int32_t> lists;
  for (int64_t b = 0; b < call.B; ++b) {
    BatchEntry& entry = entries[static_cast<size_t>(b)];
    int64_t rows = call.T, keys = call.S, position = 0;
    if (call.query_seq_lengths) {
      rows = number(call.query_seq_lengths, call.query_seq_lengths_offset, b);
    }
    if (call.key_value_seq_lengths) {
      keys = number(call.key_value_seq_lengths, call.key_value_seq_lengths_offset, b);
    }
    if (call.query_offset) position = number(call.query_offset, call.query_offset_offset, b);
    entry.rows = static_cast<int>(std::clamp<int64_t>(rows, 0, call.T));
    entry.keys = static_cast<int>(std::clamp<int64_t>(keys, 0, call.S));
    entry.first = position - parameters_.reach_left;
    entry.last = position + parameters_.reach_right;
    if (call.dropout) {
      const TokenIntegers& seeds = call.dropout.seeds;
      const int32_t* own = seeds.data + seeds.batch_offset[static_cast<size_t>(b)];
      entry.key0 = own[0];
      entry.key1 = own[1];
      entry.batch = own[2];
      entry.first_head = own[3];
      entry.head_step = own[4];
      entry.first_row = own[5];
      entry.first_key = own[6];
    }
    entry.list = -1;
    if (call.visible_keys.empty()) continue;
    const VisibleKeys* listed = call.visible_keys[static_cast<size_t>(b)].get();
    const auto [at, is_first] = starts.try_emplace(listed, static_cast<Int64>(lists.size()));
    if (is_first) append_list(*listed, call.S, lists);
    entry.list = at->second;
    entry.has_ranks = listed->has_ranks();
  }
  bindings_.copy(kEntries, entries.data(), entries.size() * sizeof(BatchEntry));
  if (!lists.empty()) bindings_.copy(kVisibleKeys, lists.data(), lists.size() * sizeof(int32_t));
}

void AttentionEncoder::add_heads(const Operand& x) {
  const size_t count = static_cast<size_t>(call_.B * call_.N) * sizeof(float);
  const size_t tables = static_cast<size_t>(kBatchTables * call_.B);
  // Sinks stand before them if anything does.
  const size_t first = tables * sizeof(Int64) + (tables_.size() > tables ? count : 0);
  tables_.resize(ceil_div(static_cast<int64_t>(first + count), int64_t{sizeof(Int64)}));
  auto* to = reinterpret_cast<char*>(tables_.data()) + first;
  for (int64_t b = 0; b < call_.B; ++b) {
    for (int64_t n = 0; n < call_.N; ++n, to += sizeof(float)) {
      const int64_t at = x.batch_offset[static_cast<size_t>(b)] + n * x.stride[0];
      std::memcpy(to, static_cast<const float*>(x.data) + at, sizeof(float));
    }
  }
}

void AttentionEncoder::bind_table(int table, const std::vector<int64_t>& offsets) {
  std::copy(offsets.begin(), offsets.end(), tables_.begin() + table * call_.B);
}

void AttentionEncoder::bind_operand(int slot, int table, const Operand& x,
                                    const std::vector<int64_t>& extents) {
  bind_table(table, x.batch_offset);
  if (*std::min_element(extents.begin(), extents.end()) == 0) return;
  bindings_.read(slot, x.data,
                 static_cast<size_t>(extent_of(x, x.batch_offset, extents)) * size_of(x.dtype));
}

void AttentionEncoder::bind_rows(int slot, int table, const QuantizableOperand& x, int64_t tokens,
                                 int64_t heads, int64_t columns, RowStrides* strides,
                                 QuantizationParameters* quantization) {
  const bool is_packed = x.dtype == DType::kU4x2;
  bind_operand(slot, table, x, {tokens, heads, is_packed ? columns / 2 : columns});
  *strides = {x.stride[0], x.stride[1]};
  const Quantization& q = x.quantization;
  if (!q) return;
  // The slots and tables of an operand's scale, offset and center, in that order.
  const int first = slot == kQuery ? kQueryScale : slot == kKey ? kKeyScale : kValueScale;
  const int first_table = slot == kQuery ? kQueryScaleBatch
                          : slot == kKey ? kKeyScaleBatch
                                         : kValueScaleBatch;
  const std::vector<int64_t> blocked = {blocks_of(tokens, q.token_block), heads,
                                        blocks_of(columns, q.head_block)};
  std::vector<int64_t> scales = blocked;
  if (q.has_powers) scales.back() += power_cells(q.token_block);
  bind_operand(first, first_table, q.scale, scales);
  quantization->scale = {q.scale.stride[0], q.scale.stride[1], q.scale.stride[2]};
  if (q.offset) {
    bind_operand(first + 1, first_table + 1, q.offset, blocked);
    quantization->offset = {q.offset.stride[0], q.offset.stride[1], q.offset.stride[2]};
  }
  if (q.center) {
    bind_operand(first + 2, first_table + 2, q.center, {1, heads, columns});
    quantization->center_head_stride = q.center.stride[1];
    quantization->has_center = 1;
  }
  quantization->token_block = narrow(q.token_block, "a block of tokens");
  quantization->head_block = static_cast<int>(q.head_block);
  quantization->offset_kind = static_cast<int>(q.offset_kind);
  quantization->has_powers = q.has_powers;
  quantization->is_bfloat16 = q.scale.dtype == DType::kBF16;
}

void AttentionEncoder::bind_result(int slot, int table, const Result& x, int64_t per_entry) {
  std::vector<int64_t> offsets(static_cast<size_t>(call_.B));
  for (int64_t b = 0; b < call_.B; ++b) offsets[static_cast<size_t>(b)] = b * per_entry;
  bind_table(table, offsets);
  bindings_.write(slot, x.data, static_cast<size_t>(call_.B * per_entry) * size_of(x.dtype));
}

void AttentionEncoder::bind_results(const AttentionForwardCall& call) {
  parameters_.out_type = element_type(call.out.dtype);
  bind_result(kOut, kOutBatch, call.out, call.T * call.N * call.V);
  bind_result(kRowMaximum, kRowMaximumBatch, call.row_maximum, call.T * call.N);
  bind_result(kLog2Sum, kLog2SumBatch, call.log2_sum, call.T * call.N);
}

void AttentionEncoder::bind_tangents(const AttentionTangentCall& call) {
  AttentionParameters& p = parameters_;
  const auto bind = [&](int slot, int table, const Operand& x,
                        const std::vector<int64_t>& extents) {
    if (!x) return JAX_GLUON_NO_TANGENT;
    bind_operand(slot, table, x, extents);
    return static_cast<int>(element_type(x.dtype));
  };
  const auto bind_rows = [&](int slot, int table, const Operand& x,
                             const std::vector<int64_t>& extents, RowStrides* strides) {
    *strides = {x.stride[0], x.stride[1]};
    return bind(slot, table, x, extents);
  };
  p.query_tangent_type = bind_rows(kQueryTangent, kQueryTangentBatch, call.query_tangent,
                                   {call.T, call.N, call.H}, &p.query_tangent);
  p.key_tangent_type = bind_rows(kKeyTangent, kKeyTangentBatch, call.key_tangent,
                                 {call.S, call.K, call.H}, &p.key_tangent);
  p.value_tangent_type = bind_rows(kValueTangent, kValueTangentBatch, call.value_tangent,
                                   {call.S, call.K, call.V}, &p.value_tangent);
  const Operand& bias = call.bias_tangent;
  p.bias_tangent_type = bind(kBiasTangent, kBiasTangentBatch, bias, {call.N, call.T, call.S});
  p.bias_tangent = {bias.stride[0], bias.stride[1], bias.stride[2]};
  p.has_sinks_tangent = static_cast<bool>(call.sinks_tangent);
  if (call.sinks_tangent) add_heads(call.sinks_tangent);
  p.out_tangent_type = element_type(call.tangent_out.dtype);
  const int64_t rows = call.B * call.T * call.N;
  bindings_.write(kOutTangent, call.tangent_out.data,
                  static_cast<size_t>(rows * call.V) * size_of(call.tangent_out.dtype));
  bindings_.write(kLogSumExpTangent, call.tangent_log_sum_exp.data,
                  static_cast<size_t>(rows) * sizeof(float));
}

template <class Call>
void AttentionEncoder::bind_cotangents(const Call& call) {
  parameters_.out_type = element_type(call.out.dtype);
  parameters_.out_gradient_type = element_type(call.d_out.dtype);
  const std::vector<int64_t> rows = {call.T, call.N, 1};
  const std::vector<int64_t> out = {call.T, call.N, call.V};
  bind_operand(kOut, kOutBatch, call.out, out);
  bind_operand(kRowMaximum, kRowMaximumBatch, call.row_maximum, rows);
  bind_operand(kLog2Sum, kLog2SumBatch, call.log2_sum, rows);
  bind_operand(kOutGradient, kOutGradientBatch, call.d_out, out);
  if (call.d_log_sum_exp) {
    bind_operand(kLogSumExpGradient, kLogSumExpGradientBatch, call.d_log_sum_exp, rows);
    parameters_.has_log_sum_exp_gradient = 1;
  }
}
template void AttentionEncoder::bind_cotangents(const AttentionBackwardCall&);
template void AttentionEncoder::bind_cotangents(const AttentionBackwardBiasCall&);

void AttentionEncoder::bind_row_statistics() {
  bindings_.scratch(kRowStatistics,
                    sizeof(RowStatistics) * static_cast<size_t>(call_.B * call_.N * call_.T));
}

void AttentionEncoder::bind_gradients(const AttentionBackwardCall& call) {
  bind_row_statistics();
  const auto bind = [&](int slot, const Result& x, int64_t per_entry) {
    bindings_.write(slot, x.data, static_cast<size_t>(call.B * per_entry) * size_of(x.dtype));
  };
  bind(kQueryGradient, call.d_query, call.T * call.N * call.H);
  bind(kKeyGradient, call.d_key, call.S * call.K * call.H);
  bind(kValueGradient, call.d_value, call.S * call.K * call.V);
}

void AttentionEncoder::bind_bias_statistics() {
  bind_row_statistics();
  AttentionParameters& p = parameters_;
  p.bias_batches = p.batch_per_map = p.B;
  p.bias_heads = p.N;
  p.bias_rows = p.T;
  p.bias_keys = 1;
  p.finds_statistics = 1;
}

void AttentionEncoder::bind_bias_gradient(const AttentionBackwardBiasCall& call) {
  AttentionParameters& p = parameters_;
  p.finds_statistics = 0;
  p.bias_gradient_type = element_type(call.d_bias.dtype);
  p.bias_batches = static_cast<int>(call.b);
  p.bias_heads = static_cast<int>(call.n);
  p.bias_rows = static_cast<int>(call.t);
  p.bias_keys = static_cast<int>(call.s);
  p.batch_per_map = static_cast<int>(call.B / call.L);
  const int64_t count = call.L * call.b * call.n * call.t * call.s;
  bindings_.write(kBiasGradient, call.d_bias.data,
                  static_cast<size_t>(count) * size_of(call.d_bias.dtype));
}

void AttentionEncoder::bind_decode(int64_t splits) {
  AttentionParameters& p = parameters_;
  p.splits = static_cast<int>(splits);
  p.split_keys = static_cast<int>(round_up(ceil_div(call_.S, splits), 8));
  const int64_t rows = call_.B * call_.K * splits * kSimdgroups * (call_.T * call_.N / call_.K);
  bindings_.scratch(kPartialOut, static_cast<size_t>(rows * call_.V) * sizeof(float));
  bindings_.scratch(kPartialStatistics, static_cast<size_t>(rows) * sizeof(PartialStatistics));
}

void AttentionEncoder::dispatch(Commands& commands, const std::string& stem,
                                const std::string& name, MTLSize grid, int passes) {
  commands.note(name);
  bindings_.copy(kBatchOffsets, tables_.data(), tables_.size() * sizeof(Int64));
  const Constants constants = {
      {kQueryType, element_type(call_.query.dtype)},
      {kKeyType, element_type(call_.key.dtype)},
      {kValueType, element_type(call_.value.dtype)},
  };
  const int64_t products = passes * call_.B * call_.N * call_.T * call_.S * (call_.H + call_.V);
  commands.dispatch(context_.pipeline(stem, name, constants), bindings_, parameters_, grid,
                    products);
}

// --- Which kernel: the type of the matrices that are multiplied ---

bool has_only(const AttentionCall& call, DType dtype) {
  return call.query.dtype == dtype && call.key.dtype == dtype && call.value.dtype == dtype;
}

namespace {

// Codes are exact in half where scale and zero point are constant along the contraction, or fold
// into the probabilities.
bool has_exact_codes(const AttentionCall& call) {
  for (const QuantizableOperand* x : {&call.query, &call.key, &call.value}) {
    if (!x->quantization || x->quantization.offset_kind == Quantization::Offset::kMinimum) {
      return false;
    }
  }
  if (call.dropout && call.value.quantization.center) return false;
  return !call.query.quantization.center && call.query.quantization.head_block == 0 &&
         call.key.quantization.head_block == 0 &&
         (call.value.quantization.head_block == 0 || call.value.quantization.token_block == 0);
}

}  // namespace

DType forward_matrices(Context& context, const AttentionCall& call, const std::string& stem) {
  if (has_only(call, DType::kF16) || has_exact_codes(call)) return DType::kF16;
  // Not every GPU and system has the type; where one head dim has it, all do.
  if (has_only(call, DType::kBF16) && context.has_kernel(stem, stem + "_bfloat_64")) {
    return DType::kBF16;
  }
  return DType::kF32;
}

DType backward_matrices(const AttentionCall& call) {
  return has_only(call, DType::kF16) ? DType::kF16 : DType::kF32;
}

std::string AttentionEncoder::suffix(DType matrices) const {
  const std::string name = matrices == DType::kF16    ? "half_"
                           : matrices == DType::kBF16 ? "bfloat_"
                                                      : "float_";
  return name + std::to_string(head_dim_);
}

}  // namespace jax_gluon::metal
