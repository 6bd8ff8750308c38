// Numbers of a call as the parameters of kernels have them.
#pragma once

#include <cstdint>
#include <string>

#include "attention_call.h"
#include "bindings.h"
#include "metal/error.h"
#include "numerics.h"

namespace jax_gluon::metal {

// What results and residuals of both devices agree on.
static_assert(kEmptyRowLog2Sum == JAX_GLUON_EMPTY_ROW_LOG2_SUM && kMinBias == JAX_GLUON_MIN_BIAS);

inline int element_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return kF32;
    case DType::kBF16:
      return kBF16;
    case DType::kF16:
      return kF16;
    case DType::kS8:
      return kS8;
    case DType::kU4x2:
      return kU4x2;
  }
  return kF32;
}

inline int narrow(int64_t value, const char* name) {
  if (value > INT32_MAX) {
    throw Error(std::string(name) + " is " + std::to_string(value) +
                "; the Metal kernels take less than 2^31");
  }
  return static_cast<int>(value);
}

}  // namespace jax_gluon::metal
