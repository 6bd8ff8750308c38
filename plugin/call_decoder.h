// From the buffers and attributes of a custom call to the calls of attention_call.h. Where
// `decoder.failed()` afterwards, the call is meaningless.
#pragma once

#include "attention_call.h"
#include "decoder.h"

namespace jax_gluon {

AttentionForwardCall decode_forward(Decoder& decoder);
AttentionBackwardCall decode_backward(Decoder& decoder);
AttentionBackwardBiasCall decode_backward_bias(Decoder& decoder);
QuantizeCall decode_quantize(Decoder& decoder);

}  // namespace jax_gluon
