// The XLA FFI handlers, one per custom-call target.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxGluonAttentionForward(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxGluonAttentionBackward(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxGluonAttentionBackwardBias(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxGluonAttentionTangent(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxGluonQuantize(XLA_FFI_CallFrame* frame);
}
