#include "ffi/kernel_query.h"

#include <stdexcept>

#include "device.h"
#include "metal/metal.h"

namespace jax_gluon {
namespace {

// What operands point at: offers look at what a call has, not at its data.
constexpr char kNothing = 0;

int64_t number(const KernelQuery& query, const std::string& name) {
  const auto found = query.numbers.find(name);
  if (found == query.numbers.end()) throw std::invalid_argument("no number " + name);
  return found->second;
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  if (name == "int8") return DType::kS8;
  if (name == "uint8") return DType::kU4x2;
  throw std::invalid_argument("no kernel for dtype " + name);
}

QuantizableOperand rows(const KernelQuery& query, const std::string& name, int64_t width) {
  QuantizableOperand x;
  x.data = &kNothing;
  const auto dtype = query.names.find(name + "_dtype");
  if (dtype == query.names.end()) throw std::invalid_argument("no name " + name + "_dtype");
  x.dtype = dtype_of(dtype->second);
  Quantization& q = x.quantization;
  q.bits = number(query, name + "_bits");
  if (!q) return x;
  q.token_block = number(query, name + "_token_block");
  q.head_block = whole_head_block(number(query, name + "_head_block"), width);
  q.offset_kind = static_cast<Quantization::Offset>(number(query, name + "_offset"));
  q.scale.data = &kNothing;
  if (q.offset_kind != Quantization::Offset::kNone) q.offset.data = &kNothing;
  if (number(query, name + "_has_center") != 0) q.center.data = &kNothing;
  q.has_powers = number(query, name + "_has_powers") != 0;
  return x;
}

template <class Call>
Call call_of(const KernelQuery& query) {
  static constexpr int32_t kZero = 0;
  static constexpr uint8_t kVisible = 1;
  Call call;
  call.B = 1;
  call.T = number(query, "T");
  call.S = number(query, "S");
  call.N = number(query, "N");
  call.K = number(query, "K");
  call.H = number(query, "H");
  call.V = number(query, "V");
  call.causal = number(query, "causal") != 0;
  call.window_left = number(query, "window_left");
  call.window_right = number(query, "window_right");
  call.query = rows(query, "query", call.H);
  call.key = rows(query, "key", call.H);
  call.value = rows(query, "value", call.V);
  if (number(query, "has_bias") != 0) call.bias.data = &kNothing;
  if (number(query, "has_mask") != 0) call.mask = &kVisible;
  if (number(query, "has_query_seq_lengths") != 0) call.query_seq_lengths = &kZero;
  if (number(query, "has_key_value_seq_lengths") != 0) call.key_value_seq_lengths = &kZero;
  if (number(query, "has_query_offset") != 0) call.query_offset = &kZero;
  if (number(query, "has_segment_ids") != 0) {
    call.query_segment_ids.data = call.key_value_segment_ids.data = &kZero;
  }
  call.page_tokens = number(query, "page_tokens");
  call.dropout.threshold = static_cast<uint32_t>(number(query, "dropout_threshold"));
  if (number(query, "has_positions") != 0) {
    call.query_positions.data = call.key_value_positions.data = &kZero;
  }
  return call;
}

const Device& device_of(const std::string& name) {
  if (name == "cpu") return cpu_device();
  if (name != "metal") throw std::invalid_argument("no device " + name);
  std::string why;
  const Device* device = metal_device(&why);
  if (!device) throw std::invalid_argument("there is no Metal device: " + why);
  return *device;
}

}  // namespace

KernelOffers find_offers(const std::string& device, const std::string& pass,
                         const KernelQuery& query) {
  const Device& found = device_of(device);
  if (pass == "forward") return found.offers(call_of<AttentionForwardCall>(query));
  if (pass == "backward") return found.offers(call_of<AttentionBackwardCall>(query));
  if (pass == "backward_bias") return found.offers(call_of<AttentionBackwardBiasCall>(query));
  throw std::invalid_argument("no pass " + pass);
}

int64_t max_visible_keys(const KernelQuery& query) {
  return max_visible_keys(call_of<AttentionForwardCall>(query));
}

}  // namespace jax_gluon
