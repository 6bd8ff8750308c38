#include "call_frame.h"

#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "device.h"
#include "ffi/handlers.h"
#include "guarded.h"
#include "xla/ffi/api/c_api.h"

// What XLA hands on without looking into it.
struct XLA_FFI_Error {
  std::string message;
};
struct XLA_FFI_ExecutionContext {
  int64_t threads;
  jax_gluon::handlers::Pool* pool;
};

namespace jax_gluon::handlers {
namespace {

// Of the call that runs on this thread.
thread_local Observer* observer_of_call = nullptr;

class InXla {
 public:
  InXla() {
    if (observer_of_call) observer_of_call->xla_begins();
  }
  InXla(const InXla&) = delete;
  InXla& operator=(const InXla&) = delete;
  ~InXla() {
    if (observer_of_call) observer_of_call->xla_ends();
  }
};

XLA_FFI_Error* make_error(const char* message) {
  const InXla in_xla;
  return new XLA_FFI_Error{message};
}
XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) { return make_error(args->message); }
void message_of_error(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->threads;
  return nullptr;
}
// XLA may run a task on the thread that schedules it.
XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  if (Pool* const pool = args->ctx->pool) {
    if (!pool->schedule(args->task, args->data)) return make_error("the pool takes no task");
  } else {
    args->task(args->data);
  }
  return nullptr;
}

const XLA_FFI_Api& api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api x = {};
    x.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    x.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
    x.XLA_FFI_Error_Create = create_error;
    x.XLA_FFI_Error_GetMessage = message_of_error;
    x.XLA_FFI_Error_Destroy = destroy_error;
    x.XLA_FFI_ThreadPool_NumThreads = count_threads;
    x.XLA_FFI_ThreadPool_Schedule = schedule;
    return x;
  }();
  return api;
}

class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }

 private:
  uint64_t state_;
};

uint32_t word_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The element's bits, in the low bytes.
uint32_t element(XLA_FFI_DataType dtype, Fill fill, Random& random) {
  const uint32_t bits = random.bits();
  if (dtype == XLA_FFI_DataType_PRED) return fill == Fill::kZero ? 0 : bits % 2;
  if (fill == Fill::kZero) return 0;
  if (fill == Fill::kBits) return bits;
  constexpr float kWide[] = {3e38f,
                             -3e38f,
                             0.0f,
                             1e-40f,
                             1e30f,
                             -1.0f,
                             std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN()};
  const bool is_wide = fill == Fill::kWide && bits % 4 == 0;
  const float x = is_wide ? kWide[bits / 4 % 9] : static_cast<float>(bits >> 8) * 0x1p-22f - 2.0f;
  switch (dtype) {
    case XLA_FFI_DataType_F32:
      return word_of(x);
    case XLA_FFI_DataType_BF16:
      return word_of(x) >> 16;
    case XLA_FFI_DataType_F16:
      return is_wide ? bits >> 16 : 0x3000 + bits % 0x1000 + (bits >> 16 & 0x8000);
    case XLA_FFI_DataType_U16:
      return word_of(std::fabs(x)) >> 16;
    case XLA_FFI_DataType_S32:
      return is_wide ? bits : bits % 23 - 2;
    default:
      return bits;
  }
}

void fill(const DrawnBuffer& drawn, const Guarded& x, Random& random) {
  const size_t size = size_of(drawn.dtype);
  const bool is_numbers = drawn.numbers > 0 && drawn.fill != Fill::kBits;
  for (size_t at = 0; at + size <= x.bytes; at += size) {
    const uint64_t bits = is_numbers ? random.bits() % static_cast<uint64_t>(drawn.numbers)
                                     : element(drawn.dtype, drawn.fill, random);
    std::memcpy(x.data + at, &bits, size);
  }
}

uint64_t digest(const Guarded& x) {
  uint64_t sum = 0;
  for (size_t i = 0; i < x.bytes; ++i) sum = sum * 31 + static_cast<uint8_t>(x.data[i]);
  return sum;
}

GuardedMemory& memory() {
  thread_local const std::unique_ptr<GuardedMemory> of_thread = std::make_unique<GuardedMemory>();
  return *of_thread;
}

// Bytes of a buffer; of one that no machine holds, as the handlers are to see: none.
size_t bytes_of(const DrawnBuffer& x) {
  size_t count = 1;
  for (const int64_t n : x.extents) {
    if (n <= 0) return 0;
    if (count > GuardedMemory::kLargest / static_cast<size_t>(n)) return 0;
    count *= static_cast<size_t>(n);
  }
  return count * size_of(x.dtype);
}

struct Buffers {
  std::vector<Guarded> memory;
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
};

Buffers make(const std::vector<DrawnBuffer>& drawn, size_t first, Random& random) {
  Buffers made;
  for (const DrawnBuffer& each : drawn) {
    const Guarded x = memory().take(first + made.memory.size(), bytes_of(each), each.at_end);
    fill(each, x, random);
    made.memory.push_back(x);
    // Of what is empty XLA may pass null.
    char* const data = x.bytes == 0 && each.at_end ? nullptr : x.data;
    made.buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, each.dtype, data,
                            static_cast<int64_t>(each.extents.size()),
                            const_cast<int64_t*>(each.extents.data())});
  }
  for (XLA_FFI_Buffer& each : made.buffers) made.pointers.push_back(&each);
  return made;
}

struct Attributes {
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan> spans, texts;
  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<double> doubles;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> values;
};

void make(const std::vector<Attribute>& drawn, Attributes& made) {
  // Pointers into them stay.
  made.spans.reserve(drawn.size());
  made.texts.reserve(drawn.size());
  made.scalars.reserve(drawn.size());
  made.doubles.assign(drawn.size(), 0.5);
  for (size_t i = 0; i < drawn.size(); ++i) {
    const Attribute& x = drawn[i];
    made.spans.push_back({x.name.data(), x.name.size()});
    made.names.push_back(&made.spans.back());
    if (x.kind == Attribute::Kind::kText) {
      made.texts.push_back({x.text.data(), x.text.size()});
      made.types.push_back(XLA_FFI_AttrType_STRING);
      made.values.push_back(&made.texts.back());
      continue;
    }
    const bool is_integer = x.kind == Attribute::Kind::kInteger;
    const bool is_float = x.kind == Attribute::Kind::kFloat;
    const void* value = is_integer ? static_cast<const void*>(&x.integer)
                        : is_float ? static_cast<const void*>(&x.number)
                                   : static_cast<const void*>(&made.doubles[i]);
    made.scalars.push_back({is_integer ? XLA_FFI_DataType_S64
                            : is_float ? XLA_FFI_DataType_F32
                                       : XLA_FFI_DataType_F64,
                            const_cast<void*>(value)});
    made.types.push_back(XLA_FFI_AttrType_SCALAR);
    made.values.push_back(&made.scalars.back());
  }
}

constexpr XLA_FFI_Handler* kHandlers[] = {JaxGluonAttentionForward, JaxGluonAttentionBackward,
                                          JaxGluonAttentionBackwardBias, JaxGluonAttentionTangent,
                                          JaxGluonQuantize};

}  // namespace

void force_variant(size_t number) {
  static const std::vector<std::string>& names =
      *new std::vector<std::string>(cpu_isas_supported());
  static size_t forced = names.size();
  if (const size_t variant = number % names.size(); variant != forced) {
    setenv("JAX_GLUON_CPU_ISA", names[variant].c_str(), 1);
    forced = variant;
  }
}

Outcome run(const DrawnCall& call, Pool* pool, Observer* observer) {
  Random random(call.seed);
  Buffers operands = make(call.operands, 0, random);
  Buffers results = make(call.results, call.operands.size(), random);
  std::vector<uint64_t> before;
  for (const Guarded& x : operands.memory) before.push_back(digest(x));
  Attributes attributes;
  make(call.attributes, attributes);
  std::vector<XLA_FFI_ArgType> arg_types(operands.pointers.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(results.pointers.size(), XLA_FFI_RetType_BUFFER);
  XLA_FFI_ExecutionContext context{call.threads, pool};

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api();
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arg_types.size()),
                arg_types.data(), operands.pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(ret_types.size()),
                ret_types.data(), results.pointers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 static_cast<int64_t>(attributes.names.size()),
                 attributes.types.data(),
                 attributes.names.data(),
                 attributes.values.data()};
  XLA_FFI_Handler* const handler = kHandlers[static_cast<size_t>(call.handler)];
  observer_of_call = observer;
  if (observer) observer->call_begins();
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  if (observer) observer->call_ends();
  observer_of_call = nullptr;

  Outcome outcome;
  outcome.succeeded = error == nullptr;
  if (error) outcome.message = error->message;
  for (size_t i = 0; i < operands.memory.size(); ++i) {
    if (digest(operands.memory[i]) != before[i]) {
      outcome.violation = "wrote operand " + std::to_string(i);
    }
    if (!memory().release(operands.memory[i])) {
      outcome.violation = "wrote beside operand " + std::to_string(i);
    }
  }
  for (size_t i = 0; i < results.memory.size(); ++i) {
    outcome.results = outcome.results * 31 + digest(results.memory[i]);
    if (!memory().release(results.memory[i])) {
      outcome.violation = "wrote beside result " + std::to_string(i);
    }
  }
  return outcome;
}

}  // namespace jax_gluon::handlers
