// The problem of the self-test, in each kind of matrices and operands that the shaders have.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "metal/self_test.h"
#include "numerics.h"

namespace jax_gluon {
namespace {

// Rows and keys for more than one block of each kernel, the last of them not whole.
constexpr int64_t kB = 1, kT = 40, kS = 72, kN = 2, kK = 1, kH = 64;

struct Kind {
  const char* name;
  DType floats;
  int64_t query_bits, bits;  // of keys and values; 0: floats
  double bar;                // relative L2 between the devices
};

// Each multiplies other matrices, or reads other operands. Either device rounds once to the dtype
// of the operands, or its probabilities to 8 bits or to half; the bars are some times that.
constexpr Kind kKinds[] = {
    {"float32", DType::kF32, 0, 0, 1e-4},   {"float16", DType::kF16, 0, 0, 1e-2},
    {"bfloat16", DType::kBF16, 0, 0, 5e-2}, {"int8", DType::kF32, 8, 8, 5e-2},
    {"int4", DType::kF32, 8, 4, 5e-2},
};

class Serial : public Parallel {
 public:
  int64_t threads() const override { return 1; }
  void run(int64_t tasks, const std::function<void(int64_t)>& body) override {
    for (int64_t task = 0; task < tasks; ++task) body(task);
  }
};

// Memory as XLA has it: zeroed, on cache lines of its own.
class Memory {
 public:
  void* make(int64_t bytes) {
    constexpr std::align_val_t kAlignment{64};
    void* data = ::operator new(static_cast<size_t>(bytes), kAlignment);
    all_.emplace_back(data, [](void* x) { ::operator delete(x, kAlignment); });
    std::memset(data, 0, static_cast<size_t>(bytes));
    return data;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> all_;
};

// Multiples of 1/16 in [-2, 2]: float16 and bfloat16 have them exactly.
float drawn(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return (static_cast<float>((state >> 8) % 65) - 32.0f) / 16.0f;
}

uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x == 0.0f) return 0;
  const uint32_t exponent = ((bits >> 23) & 0xff) - 127 + 15;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
}

float float_of(uint16_t half) {
  const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
}

void store(void* to, DType dtype, int64_t i, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(to)[i] = x;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  static_cast<uint16_t*>(to)[i] =
      dtype == DType::kF16 ? half_of(x) : static_cast<uint16_t>(bits >> 16);
}

float load(const void* from, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(from)[i];
  const uint16_t x = static_cast<const uint16_t*>(from)[i];
  if (dtype == DType::kF16) return float_of(x);
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rows [1, tokens, heads, columns], one after another.
Operand dense(void* data, DType dtype, int64_t heads, int64_t columns) {
  Operand x;
  x.data = data;
  x.dtype = dtype;
  x.batch_offset = {0};
  x.stride[0] = heads * columns;
  x.stride[1] = heads == 1 ? 0 : columns;
  x.stride[2] = columns == 1 ? 0 : 1;
  return x;
}

Result result(Memory& memory, DType dtype, int64_t tokens, int64_t heads, int64_t columns) {
  Result x;
  x.data = memory.make(tokens * heads * columns * static_cast<int64_t>(size_of(dtype)));
  x.dtype = dtype;
  x.stride[0] = tokens * heads * columns;
  x.stride[1] = heads * columns;
  x.stride[2] = columns;
  return x;
}

QuantizableOperand rows(Memory& memory, const Kind& kind, int64_t tokens, int64_t heads,
                        uint32_t seed) {
  const int64_t count = tokens * heads * kH;
  void* data = memory.make(count * static_cast<int64_t>(size_of(kind.floats)));
  for (int64_t i = 0; i < count; ++i) store(data, kind.floats, i, drawn(seed));
  QuantizableOperand x;
  static_cast<Operand&>(x) = dense(data, kind.floats, heads, kH);
  return x;
}

// The call that makes codes of `x`, which become `x`. Of 8 bits a scale for each row; of 4 bits a
// scale and a minimum for `token_block` tokens and `head_block` columns.
QuantizeCall make_codes(Memory& memory, QuantizableOperand& x, int64_t bits, int64_t tokens,
                        int64_t heads, int64_t token_block, int64_t head_block) {
  QuantizeCall call;
  call.B = kB;
  call.S = tokens;
  call.K = heads;
  call.H = kH;
  call.x = x;
  call.bits = bits;
  call.symmetric = bits == 8;
  call.float_minimum = bits == 4;
  call.token_block = token_block;
  call.head_block = head_block;
  call.map_made = {0};
  const int64_t blocks = blocks_of(tokens, token_block), groups = blocks_of(kH, head_block);
  const DType scales = bits == 8 ? DType::kF32 : DType::kBF16;
  const int64_t columns = bits == 8 ? kH : kH / 2;
  call.data = result(memory, bits == 8 ? DType::kS8 : DType::kU4x2, tokens, heads, columns);
  call.scale = result(memory, scales, blocks, heads, groups);
  if (bits == 4) call.offset = result(memory, scales, blocks, heads, groups);

  static_cast<Operand&>(x) = dense(call.data.data, call.data.dtype, heads, columns);
  Quantization& q = x.quantization;
  q.bits = bits;
  q.token_block = token_block;
  q.head_block = whole_head_block(head_block, kH);
  q.scale = dense(call.scale.data, scales, heads, groups);
  if (bits == 4) {
    q.offset_kind = Quantization::Offset::kMinimum;
    q.offset = dense(call.offset.data, scales, heads, groups);
  }
  return call;
}

void set_extents(AttentionCall& call) {
  call.cpu_kernel.kernel = Kernel::kBaseline;
  // What large problems run, and those are what goes to a GPU.
  call.metal_kernel = Kernel::kGluon;
  call.B = kB;
  call.T = kT;
  call.S = kS;
  call.N = kN;
  call.K = kK;
  call.H = call.V = kH;
  call.scale = 0.125f;
}

void append(std::vector<float>& to, const Result& from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to.push_back(load(from.data, from.dtype, i));
}

// What a device computes: output, then the gradients of query, key and value.
Status compute(Device& device, const Kind& kind, std::vector<std::vector<float>>& results) {
  Memory memory;
  Serial serial;
  KernelRun ran;
  AttentionForwardCall forward;
  set_extents(forward);
  forward.query = rows(memory, kind, kT, kN, 1);
  forward.key = rows(memory, kind, kS, kK, 2);
  forward.value = rows(memory, kind, kS, kK, 3);
  if (kind.bits != 0) {
    const bool is_int4 = kind.bits == 4;
    forward.quantize.push_back(make_codes(memory, forward.query, kind.query_bits, kT, kN, 1, 0));
    forward.quantize.push_back(
        make_codes(memory, forward.key, kind.bits, kS, kK, is_int4 ? 32 : 1, is_int4 ? 1 : 0));
    forward.quantize.push_back(
        make_codes(memory, forward.value, kind.bits, kS, kK, 1, is_int4 ? 24 : 0));
  }
  forward.out = result(memory, kind.floats, kT, kN, kH);
  forward.row_maximum = result(memory, DType::kF32, kT, kN, 1);
  forward.log2_sum = result(memory, DType::kF32, kT, kN, 1);
  if (Status status = device.forward(forward, serial, ran)) return status;

  AttentionBackwardCall backward;
  static_cast<AttentionCall&>(backward) = forward;
  backward.out = dense(forward.out.data, kind.floats, kN, kH);
  backward.row_maximum = dense(forward.row_maximum.data, DType::kF32, kN, 1);
  backward.log2_sum = dense(forward.log2_sum.data, DType::kF32, kN, 1);
  backward.d_out = rows(memory, kind, kT, kN, 4);
  backward.d_query = result(memory, kind.floats, kT, kN, kH);
  backward.d_key = result(memory, kind.floats, kS, kK, kH);
  backward.d_value = result(memory, kind.floats, kS, kK, kH);
  if (Status status = device.backward(backward, serial, ran)) return status;
  results.resize(4);
  append(results[0], forward.out, kT * kN * kH);
  append(results[1], backward.d_query, kT * kN * kH);
  append(results[2], backward.d_key, kS * kK * kH);
  append(results[3], backward.d_value, kS * kK * kH);
  return {};
}

// Not a number where either is none.
double relative_error(const std::vector<float>& actual, const std::vector<float>& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double x = actual[i], y = expected[i];
    difference += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(difference / size);
}

Status compare(Device& metal, Device& cpu, const Kind& kind) {
  constexpr const char* kNames[] = {"the output", "the query's gradient", "the key's gradient",
                                    "the value's gradient"};
  std::vector<std::vector<float>> found, expected;
  if (Status status = compute(cpu, kind, expected)) return "the CPU's kernels fail: " + *status;
  if (Status status = compute(metal, kind, found)) {
    return std::string(kind.name) + " fails: " + *status;
  }
  for (size_t i = 0; i < found.size(); ++i) {
    const double error = relative_error(found[i], expected[i]);
    if (error <= kind.bar) continue;
    char text[160];
    std::snprintf(text, sizeof text,
                  "%s fails: %s differs from the CPU's by %.2g of its size; allowed: %g", kind.name,
                  kNames[i], error, kind.bar);
    return std::string(text);
  }
  return {};
}

}  // namespace

Status compare_devices(Device& metal, Device& cpu) {
  std::string first, others;
  for (const Kind& kind : kKinds) {
    const Status status = compare(metal, cpu, kind);
    if (!status) continue;
    if (first.empty()) {
      // Without the hint for calls, which those give who ask for the verdict.
      first = status->substr(0, status->find("; implementation="));
    } else {
      others += (others.empty() ? "; so do " : ", ") + std::string(kind.name);
    }
  }
  if (first.empty()) return {};
  return first + others;
}

}  // namespace jax_gluon
