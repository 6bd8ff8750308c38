#include "ffi/handlers.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "device.h"
#include "ffi/buffer_reader.h"
#include "ffi/call_reader.h"
#include "ffi/codes_reader.h"
#include "ffi/xla_parallel.h"
#include "metal/choice.h"
#include "metal/metal.h"
#include "metal/self_test.h"
#include "numerics.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMaxProducts = std::numeric_limits<int64_t>::max();

// Where a call is to run, as its attributes say: `min_products` is the work from which one that may
// run on either goes to Metal, or -1.
struct Wanted {
  enum class Which : int64_t { kCpu = 0, kMetal = 1, kEither = 2 };
  Which which;
  int64_t min_products = -1;
};
using Which = Wanted::Which;

// Runs `run` on the device that is wanted; `products` are the call's multiply-accumulates, and
// `widest` its longest row.
template <class Run>
Status run_on(Wanted wanted, int64_t products, int64_t widest, Run run) {
  const bool is_either = wanted.which == Which::kEither;
  if (wanted.which == Which::kCpu ||
      (is_either && !prefers_metal(products, widest, wanted.min_products))) {
    return run(cpu_device());
  }
  std::string why;
  Device* device = metal_device(&why);
  const Status refusal = device ? refusal_of_metal() : "there is no Metal device: " + why;
  if (!refusal) return run(*device);
  if (is_either) return run(cpu_device());
  return *refusal + "; implementation=\"cpu\" does without";
}

// The CPU, where either would do but `is_of_cpu`.
Wanted on_cpu_if(bool is_of_cpu, Wanted wanted) {
  if (is_of_cpu && wanted.which == Which::kEither) wanted.which = Which::kCpu;
  return wanted;
}

// Metal's kernels find D themselves, of the keys that they have.
template <class Call>
Wanted device_of_part(const Call& call, Wanted wanted) {
  return on_cpu_if(call.is_partial, wanted);
}

// The CPU alone reads pages.
Wanted device_of_pages(const AttentionCall& call, Wanted wanted) {
  return on_cpu_if(call.page_tokens != 0, wanted);
}

int64_t products_of(const AttentionCall& call) {
  return call.B * call.N * call.T * call.S * (call.H + call.V);
}

// Runs an attention call's `pass`, and keeps what ran.
template <class Call>
Status run_pass(const char* name, Status (Device::*pass)(const Call&, Parallel&, KernelRun&),
                Wanted wanted, const Call& call, Parallel& parallel) {
  KernelRun run;
  run.pass = name;
  const auto run_call = [&](Device& device) {
    if (!call.block_mask || &device == &cpu_device()) return (device.*pass)(call, parallel, run);
    Call expanded = call;
    std::vector<uint8_t> mask;
    expand_block_mask(expanded, mask);
    return (device.*pass)(expanded, parallel, run);
  };
  const Status status = run_on(wanted, products_of(call), std::max(call.H, call.V), run_call);
  if (!status) keep(run);
  return status;
}

void zero(const Result& result, int64_t count) {
  std::memset(result.data, 0, static_cast<size_t>(count) * size_of(result.dtype));
}

// Moves the codes that a forward call made to the entries of the vmap axes that have them. From the
// last to the first: none lies before the place where it was made.
void spread_codes(const QuantizeCall& call) {
  if (call.B == 0) return;
  const int64_t batch = call.B / call.L;
  const int64_t scales = batch * blocks_of(call.S, call.token_block) *
                         (call.per_tensor ? 1 : call.K) * blocks_of(call.H, call.head_block);
  const auto spread = [&](const Result& x, int64_t count) {
    if (!x) return;
    const size_t bytes = static_cast<size_t>(count) * size_of(x.dtype);
    char* const data = static_cast<char*>(x.data);
    for (size_t i = call.map_made.size(); i-- > 0;) {
      const auto made = static_cast<size_t>(call.map_made[i]);
      if (made != i) std::memcpy(data + i * bytes, data + made * bytes, bytes);
    }
  };
  spread(call.data, batch * call.S * call.K * (call.bits == 4 ? call.H / 2 : call.H));
  spread(call.scale, scales);
  spread(call.offset, scales);
  spread(call.center, batch * call.K * call.H);
}

// Calls `handle`, which may throw: memory may run out anywhere.
template <class Handle>
ffi::Error guarded(const char* target, Handle handle) {
  try {
    return handle();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      std::string(target) + ": out of memory for scratch");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(target) + ": " + error.what());
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(target) + ": unknown exception");
  }
}

// A handler: reads the call, then runs it.
template <class Read, class Run>
ffi::Error handle(const char* target, ffi::ThreadPool pool, ffi::RemainingArgs args,
                  ffi::RemainingRets results, ffi::Dictionary attributes, Read read, Run run) {
  return guarded(target, [&] {
    BufferReader reader(target, args, results, attributes);
    Wanted wanted{static_cast<Which>(reader.integer("device", 0, 2))};
    const auto call = read(reader);
    // The quantizer has no products, and no such minimum.
    if (!std::is_same_v<std::decay_t<decltype(call)>, QuantizeCall>) {
      wanted.min_products = reader.integer("metal_min_products", -1, kMaxProducts);
    }
    reader.finish();
    if (reader.failed()) return ffi::Error::InvalidArgument(reader.error());
    XlaParallel parallel(pool);
    if (const Status status = run(call, wanted, parallel)) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string(target) + ": " + *status);
    }
    return ffi::Error::Success();
  });
}

ffi::Error attention_forward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                             ffi::RemainingRets results, ffi::Dictionary attributes) {
  return handle(
      "jax_gluon.attention_forward", pool, args, results, attributes, read_forward,
      [](const AttentionForwardCall& call, Wanted wanted, Parallel& parallel) -> Status {
        if (call.B * call.T * call.N == 0) {
          for (const QuantizeCall& each : call.quantize) {
            if (Status status = cpu_device().quantize(each, parallel)) return status;
          }
        } else if (Status status = run_pass("forward", &Device::forward,
                                            device_of_pages(call, wanted), call, parallel)) {
          return status;
        }
        for (const QuantizeCall& each : call.quantize) spread_codes(each);
        return {};
      });
}

ffi::Error attention_backward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                              ffi::RemainingRets results, ffi::Dictionary attributes) {
  return handle("jax_gluon.attention_backward", pool, args, results, attributes, read_backward,
                [](const AttentionBackwardCall& call, Wanted wanted, Parallel& parallel) -> Status {
                  if (call.B * call.T * call.N * call.S == 0) {
                    zero(call.d_query, call.B * call.T * call.N * call.H);
                    zero(call.d_key, call.B * call.S * call.K * call.H);
                    zero(call.d_value, call.B * call.S * call.K * call.V);
                    return {};
                  }
                  return run_pass("backward", &Device::backward, device_of_part(call, wanted), call,
                                  parallel);
                });
}

ffi::Error attention_backward_bias(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                   ffi::RemainingRets results, ffi::Dictionary attributes) {
  return handle(
      "jax_gluon.attention_backward_bias", pool, args, results, attributes, read_backward_bias,
      [](const AttentionBackwardBiasCall& call, Wanted wanted, Parallel& parallel) -> Status {
        if (call.B * call.T * call.N * call.S == 0) {
          zero(call.d_bias, call.L * call.b * call.n * call.t * call.s);
          return {};
        }
        return run_pass("backward_bias", &Device::backward_bias, device_of_part(call, wanted), call,
                        parallel);
      });
}

ffi::Error attention_tangent(ffi::ThreadPool pool, ffi::RemainingArgs args,
                             ffi::RemainingRets results, ffi::Dictionary attributes) {
  return handle("jax_gluon.attention_tangent", pool, args, results, attributes, read_tangent,
                [](const AttentionTangentCall& call, Wanted wanted, Parallel& parallel) -> Status {
                  if (call.B * call.T * call.N == 0) return {};
                  return run_pass("tangent", &Device::tangent, wanted, call, parallel);
                });
}

ffi::Error quantize(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                    ffi::Dictionary attributes) {
  return handle("jax_gluon.quantize", pool, args, results, attributes, read_quantize,
                [](const QuantizeCall& call, Wanted wanted, Parallel& parallel) {
                  // Without products: where either will do, the CPU is as near to the memory.
                  return run_on(wanted, 0, call.H,
                                [&](Device& device) { return device.quantize(call, parallel); });
                });
}

}  // namespace
}  // namespace jax_gluon

#define JAX_GLUON_BINDING \
  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs()

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionForward, jax_gluon::attention_forward,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionBackward, jax_gluon::attention_backward,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionBackwardBias, jax_gluon::attention_backward_bias,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionTangent, jax_gluon::attention_tangent,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonQuantize, jax_gluon::quantize, JAX_GLUON_BINDING);
