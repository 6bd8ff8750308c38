// Binds a call of the quantizer to the slots of shaders/bindings.h.
#pragma once

#import <Metal/Metal.h>

#include "attention_call.h"
#include "metal/buffers.h"
#include "metal/commands.h"
#include "metal/context.h"

namespace jax_gluon::metal {

class QuantizeEncoder {
 public:
  // Throws Error for what the kernels do not take.
  QuantizeEncoder(Context& context, Buffers& buffers, const QuantizeCall& call);

  void dispatch(Commands& commands);

 private:
  void dispatch(Commands& commands, const char* kernel, int64_t x, int64_t y, int64_t z);

  Context& context_;
  const QuantizeCall& call_;
  Bindings bindings_;
  QuantizeParameters parameters_ = {};
};

}  // namespace jax_gluon::metal
