// From the buffers and attributes of a custom call to the calls of attention_call.h. Where
// `reader.failed()` afterwards, the call is meaningless.
#pragma once

#include "attention_call.h"
#include "ffi/buffer_reader.h"

namespace jax_gluon {

AttentionForwardCall read_forward(BufferReader& reader);
AttentionBackwardCall read_backward(BufferReader& reader);
AttentionBackwardBiasCall read_backward_bias(BufferReader& reader);
AttentionTangentCall read_tangent(BufferReader& reader);

}  // namespace jax_gluon
