#include "metal/quantize_encoder.h"

#include <algorithm>
#include <string>
#include <vector>

#include "metal/parameters.h"
#include "numerics.h"

namespace jax_gluon::metal {
namespace {

static_assert(kCenterRows == kCenterTokens && kPowersInCell == jax_gluon::kPowersInCell &&
              kLargestPower == jax_gluon::kLargestPower);

}  // namespace

QuantizeEncoder::QuantizeEncoder(Context& context, Buffers& buffers, const QuantizeCall& call)
    : context_(context), call_(call), bindings_(context, buffers, kQuantizeExtremes + 1) {
  if (call.H > kMaxQuantizedColumns) {
    throw Error("the head dim is " + std::to_string(call.H) + "; the quantizer takes at most " +
                std::to_string(kMaxQuantizedColumns) + ": use implementation=\"cpu\"");
  }
  if (call.B * call.S * call.K == 0) return;
  QuantizeParameters& p = parameters_;
  p.x = {call.x.stride[0], call.x.stride[1]};
  p.B = narrow(call.B, "the batch");
  p.S = narrow(call.S, "the number of tokens");
  p.K = narrow(call.K, "the number of heads");
  p.H = static_cast<int>(call.H);
  p.batch_per_map = static_cast<int>(call.B / call.L);
  p.x_type = element_type(call.x.dtype);
  p.bits = static_cast<int>(call.bits);
  p.is_symmetric = call.symmetric;
  p.has_minimum = call.float_minimum;
  p.token_block = narrow(call.token_block, "a block of tokens");
  p.head_block = narrow(call.head_block, "a block of columns");
  p.is_per_tensor = call.per_tensor;
  p.has_center = call.is_centered;
  p.has_visible = call.visible != nullptr;
  p.is_rotated = call.rotate;
  p.is_bfloat16 = call.scale.dtype == DType::kBF16;
  p.has_powers = call.has_powers;
  p.chunks = static_cast<int>(ceil_div(call.S, kChunkTokens));

  std::vector<Int64> tables(static_cast<size_t>(2 * call.B));
  std::copy(call.x.batch_offset.begin(), call.x.batch_offset.end(), tables.begin());
  const auto past = [](const std::vector<int64_t>& offsets, int64_t extent) {
    return static_cast<size_t>(*std::max_element(offsets.begin(), offsets.end()) + extent);
  };
  const int64_t extent = (call.S - 1) * call.x.stride[0] + (call.K - 1) * call.x.stride[1] + call.H;
  bindings_.read(kQuantizeInput, call.x.data,
                 past(call.x.batch_offset, extent) * size_of(call.x.dtype));
  if (call.visible) {
    std::copy(call.visible_offset.begin(), call.visible_offset.end(), tables.begin() + call.B);
    bindings_.read(kQuantizeVisible, call.visible, past(call.visible_offset, call.S));
  }
  bindings_.copy(kQuantizeParameters, &p, sizeof p);
  bindings_.copy(kQuantizeBatchOffsets, tables.data(), tables.size() * sizeof(Int64));

  const int64_t tokens = blocks_of(call.S, call.token_block);
  const int64_t columns = blocks_of(call.H, call.head_block);
  const int64_t blocks = call.B * tokens * (call.per_tensor ? 1 : call.K);
  const int64_t cells = call.has_powers ? power_cells(call.token_block) : 0;
  const auto write = [&](int slot, const Result& x, int64_t count) {
    if (x) bindings_.write(slot, x.data, static_cast<size_t>(count) * size_of(x.dtype));
  };
  write(kQuantizeData, call.data, call.B * call.S * call.K * call.H / (call.bits == 4 ? 2 : 1));
  write(kQuantizeScale, call.scale, blocks * (columns + cells));
  write(kQuantizeOffset, call.offset, blocks * columns);
  write(kQuantizeCenter, call.center, call.B * call.K * call.H);
  if (call.token_block == 0) {
    bindings_.scratch(kQuantizeExtremes,
                      static_cast<size_t>(call.B * call.K * p.chunks * 2 * call.H) * sizeof(float));
  } else if (call.has_powers) {
    bindings_.scratch(kQuantizeExtremes, static_cast<size_t>(call.B * call.K) * sizeof(float));
  }
}

void QuantizeEncoder::dispatch(Commands& commands, const char* kernel, int64_t x, int64_t y,
                               int64_t z) {
  commands.dispatch(context_.pipeline("quantize", kernel, {}), bindings_,
                    MTLSizeMake(static_cast<NSUInteger>(x), static_cast<NSUInteger>(y),
                                static_cast<NSUInteger>(z)));
}

void QuantizeEncoder::dispatch(Commands& commands) {
  if (call_.B * call_.S * call_.K == 0) return;
  if (call_.is_centered) dispatch(commands, "quantize_center", call_.K, call_.B, 1);
  if (call_.token_block != 0) {
    const int64_t tokens = ceil_div(call_.S, call_.token_block);
    dispatch(commands, "quantize_blocks", ceil_div(tokens, kSimdgroups), call_.K, call_.B);
    return;
  }
  dispatch(commands, "quantize_extremes", ceil_div(parameters_.chunks, kSimdgroups), call_.K,
           call_.B);
  dispatch(commands, "quantize_parameters", call_.per_tensor ? 1 : call_.K, call_.B, 1);
  dispatch(commands, "quantize_codes", ceil_div(call_.S, kSimdgroups), call_.K, call_.B);
}

}  // namespace jax_gluon::metal
